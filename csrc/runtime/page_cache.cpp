#include "runtime/page_cache.h"

#include <sys/mman.h>

#include <algorithm>
#include <mutex>
#include <new>
#include <vector>

namespace amil {
namespace {

constexpr size_t kHugePage = 2 << 20;
constexpr size_t kMaxCachedBlocks = 4;
constexpr size_t kMaxCachedBytes = size_t(1) << 30;
constexpr size_t kMaxResidentBytes = 256 << 20;

struct CachedBlock {
    void* data;
    size_t capacity;
    bool released;  // MADV_FREE was applied: the system may reclaim the pages
};

struct PageCache {
    std::mutex mutex;
    std::vector<CachedBlock> cached;  // oldest first
};

// Never destroyed: Python may free the last tensors after the destruction of static C++ objects.
PageCache& cache() {
    static PageCache* const instance = new PageCache;
    return *instance;
}

void* map(size_t capacity) {
    // Align to huge pages: map one more than needed and unmap the excess before and after.
    const size_t mapped = capacity + kHugePage;
    void* const p = mmap(nullptr, mapped, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (p == MAP_FAILED) throw std::bad_alloc();
    char* const begin = static_cast<char*>(p);
    char* const aligned = begin + (kHugePage - reinterpret_cast<size_t>(begin) % kHugePage) % kHugePage;
    if (aligned > begin) munmap(begin, aligned - begin);
    munmap(aligned + capacity, begin + mapped - (aligned + capacity));
#ifdef MADV_HUGEPAGE
    madvise(aligned, capacity, MADV_HUGEPAGE);
#endif
    return aligned;
}

}  // namespace

PageBlock::PageBlock(size_t bytes) : size_(bytes) {
    capacity_ = std::max<size_t>((bytes + kHugePage - 1) / kHugePage, 1) * kHugePage;
    {
        const std::lock_guard<std::mutex> lock(cache().mutex);
        std::vector<CachedBlock>& cached = cache().cached;
        // Reuse the most recently freed block that is large enough and at most twice as large as needed.
        for (auto block = cached.rbegin(); block != cached.rend(); ++block) {
            if (block->capacity < capacity_ || block->capacity / 2 > capacity_) continue;
            data_ = block->data;
            capacity_ = block->capacity;
            cached.erase(std::next(block).base());
            return;
        }
    }
    data_ = map(capacity_);
}

PageBlock::~PageBlock() {
    std::vector<CachedBlock> dropped;
    {
        const std::lock_guard<std::mutex> lock(cache().mutex);
        std::vector<CachedBlock>& cached = cache().cached;
        cached.push_back({data_, capacity_, false});
        size_t bytes = 0;
        for (auto block = cached.rbegin(); block != cached.rend(); ++block) {
            bytes += block->capacity;
#ifdef MADV_FREE
            if (bytes > kMaxResidentBytes && !block->released) {
                madvise(block->data, block->capacity, MADV_FREE);
                block->released = true;
            }
#endif
        }
        while (!cached.empty() && (bytes > kMaxCachedBytes || cached.size() > kMaxCachedBlocks)) {
            bytes -= cached.front().capacity;
            dropped.push_back(cached.front());
            cached.erase(cached.begin());
        }
    }
    for (const CachedBlock& block : dropped) munmap(block.data, block.capacity);
}

}  // namespace amil
