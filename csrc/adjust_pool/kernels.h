// Arguments and entry points of the adjust pooling kernels. Each function processes one bag, or one chunk of it, so
// that a schedule (schedule.h) can distribute the pieces over threads.
//
// Forward. The logits start at 0, so those of iteration t are b^t = F S_{t-1} with the running sum S_{t-1} = s^1 + ...
// + s^{t-1} (Eq. 5). Each iteration is attention with a single query, computed in one pass over F by a softmax with a
// running maximum:
//
//     sigma^t = sum_i w_i f_i (Eq. 2),  w = softmax(F S_{t-1}) (Eq. 4),  s^t = squash(sigma^t) (Eq. 3),
//     S_t = S_{t-1} + s^t
//
// For each iteration, the softmax is saved as two numbers:
//
//     w_i = exp(b_i - shift) scale,  scale = 1 / sum_i exp(b_i - shift);  scale = 0 for an empty bag
//
// with a shift close to the largest logit. (Their combination, the log-sum-exp, would lose log(1 / scale) to rounding
// where the logits are large: in float32 the weights of 1000 equal instances of norm 10^6 would sum to 1.033.)
//
// Backward, with g = dL/ds^T, e^t = dL/dsigma^t, squash's Jacobian J, v = dL/dw^T:
//
//     e^T = J(sigma^T)' g
//     for t = T ... 2:   w_i    = exp(f_i . S_{t-1} - shift^t) scale^t
//                        beta_i = w_i (f_i . e^t + v_i [t = T] - c),  c = sigma^t . e^t + sum_j w_j v_j [t = T]
//                        dL/dS_{t-1} = sum_i beta_i f_i
//                        e^{t-1} = J(sigma^{t-1})' (dL/dS_{t-1} + ... + dL/dS_{T-1})
//     dL/df_i = e^1 / m + sum_{t >= 2} (w_i^t e^t + beta_i^t S_{t-1})
//
// The last line needs only the two scalars w_i^t and beta_i^t per instance and iteration. They are stored, so the final
// pass writes dL/df without reading F.
//
// c equals sum_j w_j x_j, where x_j = f_j . e^t + v_j, and every x_i - c vanishes if one weight is 1. The c computed
// from sigma differs from the sum over the rounded x_j by about eps |sigma| |e|, which every iteration multiplies by
// |F|. The sum is known at the end of the pass only, so the pass uses c, and its end corrects by delta = sum_i beta_i,
// which is 0 in exact arithmetic: beta_i - delta w_i is obtained by subtracting delta sigma^t from dL/dS_{t-1}, and
// delta S_{t-1} from the e^t of the last line.
// The correction cannot replace the term of v in c: delta would be of the size of v, and leave errors of eps |v|.
//
// A bag is divided into chunks of kChunkBytes; the division depends on the bag's size only. Each chunk contributes one
// partial result, and partial results are merged in chunk order, so results are bit-identical for any number of threads
// and any assignment of chunks to threads.
#pragma once

#include <cstdint>

#include "runtime/dtype.h"

namespace amil {

constexpr int kBlock = 16;                  // rows that a kernel processes at a time
constexpr int64_t kChunkBytes = 256 << 10;  // in accumulation-type rows: an eighth of a 2 MiB L2 cache

// The rows of one bag and the scratch that forward and backward share. "acc" is float64 for float64 and float32 for all
// other dtypes. Scratch vectors have Dp entries, D rounded up to a multiple of kBlock; the last Dp - D are 0.
struct BagRows {
    const void* f;  // row i in memory starts at element i * row_stride
    int64_t row_stride;
    const int64_t* index;    // (m,) positions of the real rows in memory, ascending; nullptr: rows 0 .. m - 1
    int64_t m;               // number of real instances
    int64_t rows_in_memory;  // >= m; rows that are not real get weight 0 and gradient 0
    int64_t D, Dp;
    int T;
    int64_t chunk_rows, num_chunks;  // num_chunks >= 1: an empty bag has one empty chunk

    // Prefetch distance in elements for bags larger than L2 (one block of rows); 0 disables prefetching. The hardware
    // prefetcher loses track of rows that are read eight at a time: relying on it alone, a pass takes 1.6 times as long
    // at 128 features and 1.15 times as long at 512 (AMD EPYC, Zen 4).
    int64_t prefetch_distance;

    void* vectors;   // acc scratch, (num_vectors(T), Dp); see ForwardBag and BackwardBag
    void* partials;  // acc scratch, (num_chunks, kBlock + Dp); see simd/blocks.h
    void* copy;      // acc scratch, (m, Dp), or nullptr: rows converted to acc and padded to Dp, reused by later passes
    bool copied;     // `copy` has been filled

    int64_t approximate_bytes() const { return m * Dp * static_cast<int64_t>(sizeof(float)); }
};

// Arguments and workspace of the forward pass over one bag.
struct ForwardBag : BagRows {
    void* sigma;          // (T, D) acc, output
    void* softmax_stats;  // (T, 2) acc, output
    void* bag;            // (D,), output
    void* weights;        // (rows_in_memory,) acc, output; nullptr if not requested

    // The part of the next bag that is still to be prefetched, and the number of bytes to advance per block of rows.
    const char *prefetch_begin, *prefetch_end;
    int64_t prefetch_bytes_per_block;

    static int64_t num_vectors(int T) { return T; }  // S_1 .. S_{T-1}, one temporary
};

// Arguments and workspace of the backward pass over one bag.
struct BackwardBag : BagRows {
    const void* sigma;          // (T, D) acc, from the forward pass
    const void* softmax_stats;  // (T, 2) acc, from the forward pass
    const void* grad_bag;       // (D,), or nullptr
    const void* grad_weights;   // (rows_in_memory,) acc, or nullptr
    void* grad_f;               // (rows_in_memory, D) contiguous, output
    bool detach_routing;
    bool non_temporal_stores;  // write grad_f past the cache: it is too large to stay there until it is read

    void* coefficients;    // acc scratch, (2 (T - 1), m): w^2, beta^2, w^3, beta^3, ...
    double sigma_dot_e;    // sigma^t . e^t of the next iteration to be processed
    double weights_dot;    // sum_j w_j v_j
    int64_t rows_written;  // real rows whose gradient has been written

    static int64_t num_vectors(int T) { return 2 * T + 1; }  // S_1 .. S_{T-1}, e^1 .. e^T, one sum, one temporary
};

// All passes over a bag but the first run from the cache and leave the memory bandwidth idle. The forward passes use it
// to prefetch the next bag into L2, one cache line in every kPrefetchStride bytes; the hardware prefetcher recognizes
// this as a stream and fills in the lines between. (Prefetching every line is slower than not prefetching, and so is
// summing the next bag here: a core has few line fill buffers, and the loads of the current bag wait for them. Of
// strides of 1 to 16 lines, 5 was fastest: forward takes 0.75 of the time without prefetching at 32 KiB per bag and
// 0.88 at 512 KiB; Intel Xeon with 2 MiB of L2 cache.)
constexpr int64_t kPrefetchStride = 5 * 64;

// The backward passes write the gradient of the previous bag meanwhile, since writing is bound by memory as well.
struct OverlappedWrite {
    BackwardBag* bag;  // the previous bag; nullptr: nothing to write
    int64_t blocks;    // number of its blocks to write per block of the current bag
};

// `stage` is acc scratch of (kBlock + 1) * Dp elements, owned by the calling thread, whose last Dp elements are 0.
struct ForwardKernels {
    void (*chunk)(ForwardBag& bag, int t, int64_t chunk, void* stage);  // partial sigma^t of a chunk
    void (*merge)(ForwardBag& bag, int t);                  // sigma^t, its softmax and S_t; for t = T the pooled vector
    void (*weights_chunk)(ForwardBag& bag, int64_t chunk);  // the weights of iteration T
};

struct BackwardKernels {
    void (*begin)(BackwardBag& bag);                                          // S_1 .. S_{T-1} and e^T
    void (*weights_dot_chunk)(BackwardBag& bag, int64_t chunk, void* stage);  // partial sum_j w_j v_j of a chunk
    void (*weights_dot_merge)(BackwardBag& bag);
    // w^t, beta^t and the partial dL/dS_{t-1} of a chunk
    void (*chunk)(BackwardBag& bag, int t, int64_t chunk, void* stage, OverlappedWrite previous);
    void (*merge)(BackwardBag& bag, int t);  // e^{t-1}
    void (*end)(BackwardBag& bag);           // e^1 / m, the term that all rows of dL/df share
    // dL/df of the real rows begin .. end - 1, and 0 for the rows between them that are not real
    void (*write)(const BackwardBag& bag, int64_t begin, int64_t end, void* stage);
};

// One copy per instruction set, from simd/forward.cpp and simd/backward.cpp.
namespace baseline {
const ForwardKernels& adjust_pool_forward_kernels(Dtype dtype);
const BackwardKernels& adjust_pool_backward_kernels(Dtype dtype);
}  // namespace baseline
namespace avx2 {
const ForwardKernels& adjust_pool_forward_kernels(Dtype dtype);
const BackwardKernels& adjust_pool_backward_kernels(Dtype dtype);
}  // namespace avx2
namespace avx512 {
const ForwardKernels& adjust_pool_forward_kernels(Dtype dtype);
const BackwardKernels& adjust_pool_backward_kernels(Dtype dtype);
}  // namespace avx512

}  // namespace amil
