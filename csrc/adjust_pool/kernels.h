// The vector code of adjust pooling: what happens to one bag, in pieces that different threads may take.
//
// Forward. The logits start at 0, so those of iteration t are b^t = F S_{t-1} with the running sum S_{t-1} = s^1 + ...
// + s^{t-1}: each iteration is attention with one query, and one pass over F is enough (softmax with a running
// maximum):
//
//     sigma^t = sum_i w_i f_i,  w = softmax(F S_{t-1}),  s^t = squash(sigma^t),  S_t = S_{t-1} + s^t
//
// Backward, with g = dL/ds^T, e^t = dL/dsigma^t, squash's Jacobian J, v = dL/dw^T and lse^t the log-sum-exp of b^t:
//
//     e^T = J(sigma^T)' g
//     for t = T ... 2:   w_i    = exp(f_i . S_{t-1} - lse^t)
//                        beta_i = w_i (f_i . e^t + v_i [t = T] - c),  c = sigma^t . e^t + sum_j w_j v_j [t = T]
//                        dL/dS_{t-1} = sum_i beta_i f_i
//                        e^{t-1} = J(sigma^{t-1})' (dL/dS_{t-1} + ... + dL/dS_{T-1})
//     dL/df_i = e^1 / m + sum_{t >= 2} (w_i^t e^t + beta_i^t S_{t-1})
//
// The last line needs two numbers per instance and iteration, which are kept, so it does not read F.
//
// A bag is cut into chunks of kChunkBytes, by its size alone. A chunk's sums are one partial result, and partial
// results are merged in the order of the chunks: the same bits come out however many threads there are and whichever
// takes what.
#pragma once

#include <cstdint>

#include "runtime/dtype.h"
#include "runtime/instruction_set.h"

namespace amil {

constexpr int kBlock = 16;                  // rows a kernel takes at a time
constexpr int64_t kChunkBytes = 256 << 10;  // of accumulation-type rows: an eighth of a 2 MiB L2 cache

// One bag on its way through forward or backward. "acc" is float64 for float64, float32 for all other dtypes; vectors
// of scratch have Dp = D rounded up to kBlock entries, the last Dp - D of them 0.
struct BagWork {
    const void* f;  // row i in memory at f + i * row_stride
    int64_t row_stride;
    const int64_t* index;    // (m,) which rows in memory are real, ascending; nullptr: rows 0 .. m - 1
    int64_t m;               // real instances
    int64_t rows_in_memory;  // >= m; what is not real gets weight 0 and gradient 0
    int64_t D, Dp;
    int T;
    int64_t chunk_rows, chunks;  // at least one chunk, empty in an empty bag

    const void* sigma;  // (T, D) acc; the forward pass writes it
    const void* lse;    // (T,) acc; the forward pass writes it
    void* bag;          // forward: (D,) or nullptr
    void* weights;      // forward: (rows_in_memory,) acc, or nullptr

    const void* grad_bag;      // backward: (D,) or nullptr
    const void* grad_weights;  // backward: (rows_in_memory,) acc, or nullptr
    void* grad_f;              // backward: (rows_in_memory, D) contiguous
    bool detach_routing;

    // Forward: what remains to be fetched of the next bag, and how much of it after each block of rows.
    const char *fetch, *fetch_end;
    int64_t fetch_bytes;

    // Passes over a bag that no cache holds ask for the block of rows after the one at hand, by the distance in entries
    // (0: they don't). The processor's own guess of what comes next loses track of rows that are read eight at a time:
    // with it alone a pass takes 1.6 times as long at 128 features, 1.15 times at 512 (an EPYC of the Zen 4
    // generation).
    int64_t ahead;

    bool stream_out;  // write grad_f past the cache: it is too large to be there when somebody reads it

    void* vectors;       // acc scratch, (vectors(T), Dp)
    void* partials;      // acc scratch, (chunks, kBlock + Dp): what the logits' exponentials are relative to, their
                         // sum; the weighted sum of rows
    void* copy;          // acc scratch, (m, Dp), or nullptr: the rows as the arithmetic wants them, for later passes
    bool copied;         // a pass has filled it
    void* coefficients;  // backward: acc scratch, (2 (T - 1), m): w^2, beta^2, w^3, beta^3, ...
    double sigma_dot_e;  // backward: sigma^t . e^t of the iteration to come
    double weights_dot;  // backward: sum_j w_j v_j

    int64_t written;  // backward: rows whose gradient is written

    int64_t bytes() const { return m * Dp * static_cast<int64_t>(sizeof(float)); }  // roughly

    static int64_t num_vectors(int T) { return 2 * T + 1; }  // S_1 .. S_{T-1}, e^1 .. e^T, one for sums, one spare
};

// Passes after the first run from the cache and leave the memory idle. In forward they fetch the next bag to the L2
// cache, every kFetchStride-th line of it: the processor takes such a sparse walk for a stream and fetches the lines
// between by itself. (Fetching every line is slower than fetching nothing, as is summing the next bag here: a core has
// few buffers for lines that it asked for, and the passes over this bag wait for them. Of strides 1 to 16, 5 was best:
// forward takes 0.75 of the time without at 32 KiB a bag, 0.88 at 512 KiB; a Xeon with 2 MiB of L2 cache.)
constexpr int64_t kFetchStride = 5 * 64;

// In backward they write the gradient of the bag before beside them, for writing waits for memory too.
struct Beside {
    BagWork* bag;    // nullptr: nothing
    int64_t blocks;  // of it, for each block of this bag
};

// Functions take `stage`, acc scratch of (kBlock + 1) * Dp entries that belongs to the calling thread, its last Dp
// entries 0.
struct AdjustPoolKernels {
    void (*forward_chunk)(BagWork& bag, int t, int64_t chunk, void* stage);  // a partial sigma^t
    void (*forward_merge)(BagWork& bag, int t);                              // sigma^t, lse^t, S_t; after T the result
    void (*weights_chunk)(BagWork& bag, int64_t chunk);                      // the weights of iteration T
    void (*backward_begin)(BagWork& bag);                                    // S_1 .. S_{T-1}, e^T
    void (*backward_weights_chunk)(BagWork& bag, int64_t chunk, void* stage);  // a partial sum_j w_j v_j
    void (*backward_weights_merge)(BagWork& bag);
    void (*backward_chunk)(BagWork& bag, int t, int64_t chunk, void* stage,
                           Beside beside);        // w^t, beta^t, partial dL/dS
    void (*backward_merge)(BagWork& bag, int t);  // e^{t-1}
    void (*backward_end)(BagWork& bag);           // what all rows of dL/df share
    void (*backward_write)(BagWork& bag, int64_t end,
                           void* stage);  // dL/df from row bag.written to end, and 0 beside it
};

const AdjustPoolKernels& adjust_pool_kernels(InstructionSet instruction_set, Dtype dtype);

// One copy per instruction set, from csrc/adjust_pool/simd/kernels.cpp.
namespace baseline {
const AdjustPoolKernels& adjust_pool_kernels(Dtype dtype);
}
namespace avx2 {
const AdjustPoolKernels& adjust_pool_kernels(Dtype dtype);
}
namespace avx512 {
const AdjustPoolKernels& adjust_pool_kernels(Dtype dtype);
}

}  // namespace amil
