// Sizes of the processor's caches. Only the order of work and the kind of stores depend on them, never a result.
#pragma once

#include <cstdint>

namespace amil {

struct Caches {
    int64_t l2;  // bytes, of one core
    int64_t l3;  // bytes, shared by some cores
};

// Those of the first core, found once.
const Caches& caches();

}  // namespace amil
