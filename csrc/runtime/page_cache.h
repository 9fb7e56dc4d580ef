// A cache of large memory blocks that keep their pages after they are freed.
#pragma once

#include <cstddef>

namespace amil {

// The C library returns large freed blocks to the operating system, so each page of the next block is mapped and zeroed
// on first touch: on a 2-core server that takes twice as long as the backward pass that fills the block. PageBlock uses
// huge pages where available and caches freed blocks, at most kMaxCachedBlocks of kMaxCachedBytes in total. The most
// recently freed kMaxResidentBytes keep their pages; the system may reclaim the pages of older blocks when memory is
// short (MADV_FREE, which makes the next pass over them a third slower).
class PageBlock {
  public:
    explicit PageBlock(size_t bytes);  // throws std::bad_alloc
    ~PageBlock();
    PageBlock(const PageBlock&) = delete;
    PageBlock& operator=(const PageBlock&) = delete;

    void* data() const { return data_; }
    size_t size() const { return size_; }  // as requested

  private:
    void* data_;
    size_t size_, capacity_;
};

}  // namespace amil
