// Large blocks of memory that keep their pages when they are freed.
#pragma once

#include <cstddef>

namespace amil {

// The C library gives a large freed block back to the system, and every page of the next one is zeroed and mapped anew
// on first touch: on a 2-core server that costs twice as much as the backward pass that fills it. These blocks use huge
// pages where there are any, and are kept after they were freed, at most kMostKeptBlocks of kMostKeptBytes together.
// The last kMostResidentBytes of them keep their pages; those of the others the system may take back whenever it needs
// memory (MADV_FREE, which makes the next pass over them a third slower).
class PageBlock {
  public:
    explicit PageBlock(size_t bytes);  // throws std::bad_alloc
    ~PageBlock();
    PageBlock(const PageBlock&) = delete;
    PageBlock& operator=(const PageBlock&) = delete;

    void* data() const { return data_; }
    size_t size() const { return size_; }  // what was asked for

  private:
    void* data_;
    size_t size_, capacity_;
};

}  // namespace amil
