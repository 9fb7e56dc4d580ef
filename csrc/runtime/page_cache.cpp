#include "runtime/page_cache.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstdint>
#include <mutex>
#include <new>

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
    // Free blocks, oldest first. An array, since the destructor of a block must not fail for lack of memory.
    CachedBlock blocks[kMaxCachedBlocks];
    size_t count = 0;

    CachedBlock take(size_t i) {
        const CachedBlock block = blocks[i];
        std::move(blocks + i + 1, blocks + count, blocks + i);
        --count;
        return block;
    }
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
    if (bytes > SIZE_MAX / 2) throw std::bad_alloc();
    capacity_ = std::max<size_t>((bytes + kHugePage - 1) / kHugePage, 1) * kHugePage;
    {
        PageCache& free = cache();
        const std::lock_guard<std::mutex> lock(free.mutex);
        // Reuse the most recently freed block that is large enough and at most twice as large as needed.
        for (size_t i = free.count; i-- > 0;) {
            if (free.blocks[i].capacity < capacity_ || free.blocks[i].capacity / 2 > capacity_) continue;
            const CachedBlock block = free.take(i);
            data_ = block.data;
            capacity_ = block.capacity;
            return;
        }
    }
    data_ = map(capacity_);
}

PageBlock::~PageBlock() {
    CachedBlock dropped[kMaxCachedBlocks + 1];
    size_t num_dropped = 0;
    {
        PageCache& free = cache();
        const std::lock_guard<std::mutex> lock(free.mutex);
        size_t bytes = capacity_;
        for (size_t i = 0; i < free.count; ++i) bytes += free.blocks[i].capacity;
        while (free.count && (bytes > kMaxCachedBytes || free.count == kMaxCachedBlocks)) {
            bytes -= free.blocks[0].capacity;
            dropped[num_dropped++] = free.take(0);
        }
        const CachedBlock block{data_, capacity_, false};
        if (bytes > kMaxCachedBytes)
            dropped[num_dropped++] = block;
        else
            free.blocks[free.count++] = block;
#ifdef MADV_FREE
        bytes = 0;
        for (size_t i = free.count; i-- > 0;) {
            bytes += free.blocks[i].capacity;
            if (bytes <= kMaxResidentBytes || free.blocks[i].released) continue;
            madvise(free.blocks[i].data, free.blocks[i].capacity, MADV_FREE);
            free.blocks[i].released = true;
        }
#endif
    }
    for (size_t i = 0; i < num_dropped; ++i) munmap(dropped[i].data, dropped[i].capacity);
}

}  // namespace amil
