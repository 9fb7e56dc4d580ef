#include "runtime/page_cache.h"

#include <sys/mman.h>

#include <algorithm>
#include <mutex>
#include <new>
#include <vector>

namespace amil {
namespace {

constexpr size_t kHugePage = 2 << 20;
constexpr size_t kMostKeptBlocks = 4;
constexpr size_t kMostKeptBytes = size_t(1) << 30;
constexpr size_t kMostResidentBytes = 256 << 20;

struct Block {
    void* data;
    size_t capacity;
    bool released;  // the system was told that it may take the pages
};

struct Cache {
    std::mutex mutex;
    std::vector<Block> kept;  // oldest first
};

// Never destroyed: Python may free the last tensors after C++ has destroyed its static objects.
Cache& cache() {
    static Cache* const instance = new Cache;
    return *instance;
}

void* map(size_t capacity) {
    // Whole huge pages: map one more than needed and cut off what lies before and after.
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
        std::vector<Block>& kept = cache().kept;
        // The newest that is large enough without being wasteful.
        for (auto block = kept.rbegin(); block != kept.rend(); ++block) {
            if (block->capacity < capacity_ || block->capacity / 2 > capacity_) continue;
            data_ = block->data;
            capacity_ = block->capacity;
            kept.erase(std::next(block).base());
            return;
        }
    }
    data_ = map(capacity_);
}

PageBlock::~PageBlock() {
    std::vector<Block> dropped;
    {
        const std::lock_guard<std::mutex> lock(cache().mutex);
        std::vector<Block>& kept = cache().kept;
        kept.push_back({data_, capacity_, false});
        size_t bytes = 0;
        for (auto block = kept.rbegin(); block != kept.rend(); ++block) {
            bytes += block->capacity;
#ifdef MADV_FREE
            if (bytes > kMostResidentBytes && !block->released) {
                madvise(block->data, block->capacity, MADV_FREE);
                block->released = true;
            }
#endif
        }
        while (!kept.empty() && (bytes > kMostKeptBytes || kept.size() > kMostKeptBlocks)) {
            bytes -= kept.front().capacity;
            dropped.push_back(kept.front());
            kept.erase(kept.begin());
        }
    }
    for (const Block& block : dropped) munmap(block.data, block.capacity);
}

}  // namespace amil
