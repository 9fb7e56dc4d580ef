// Adjust pooling on the CPU, forward and backward. Equations and letters are those of the reference
// (amil_fast/ops/adjust_pool_reference.py); kernels.h derives the recurrences that need only one pass over the
// instances per iteration.
#pragma once

#include <cstdint>

#include "runtime/dtype.h"

namespace amil {

// Bags of instances, padded (offsets == nullptr) or packed. Strides count elements; instances have unit stride along D.
struct Bags {
    const void* instances;  // padded (B, N, D), packed (total, D)
    Dtype dtype;            // "acc" below: float64 for float64, float32 for all others
    int64_t B, N, D;        // N: padded length; unused for packed bags
    int64_t bag_stride;     // padded only
    int64_t row_stride;
    const int64_t* offsets;  // (B + 1,) packed, else nullptr
    const int64_t* lengths;  // (B,) padded, or nullptr
    const uint8_t* mask;     // (B, N) contiguous, nonzero = real, or nullptr
    int T;
    int num_threads;
};

struct ForwardOutputs {
    void* bag;            // (B, D), dtype
    void* weights;        // (B, N) or (total,), acc; nullptr if not requested
    void* sigma;          // (B, T, D), acc
    void* softmax_stats;  // (B, T, 2), acc: shift and scale, see kernels.h
};

struct BackwardArguments {
    const void* grad_bag;       // (B, D) contiguous, dtype; nullptr = 0
    const void* grad_weights;   // (B, N) or (total,) contiguous, acc; nullptr = 0
    const void* sigma;          // (B, T, D), acc
    const void* softmax_stats;  // (B, T, 2), acc
    bool detach_routing;
    void* grad_instances;  // (B, N, D) or (total, D) contiguous, dtype; every element is written
};

void adjust_pool_forward(const Bags& bags, const ForwardOutputs& out);
void adjust_pool_backward(const Bags& bags, const BackwardArguments& args);

}  // namespace amil
