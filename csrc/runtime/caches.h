// Cache sizes of the processor. They determine the order of work and the kind of stores, but never a result.
#pragma once

#include <cstdint>

namespace amil {

struct Caches {
    int64_t l2;  // bytes per core
    int64_t l3;  // bytes, shared by several cores
};

// The caches of the first core, determined on the first call.
const Caches& caches();

}  // namespace amil
