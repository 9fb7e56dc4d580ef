// Forward pass of adjust pooling, compiled once per instruction set; see kernels.h for the equations.
#include "adjust_pool/kernels.h"
#include "adjust_pool/simd/blocks.h"
#include "runtime/vector.h"

namespace amil {
namespace {

// Logits may exceed the shift of their exponentials by this much (a factor of about 10^7) before the sums are rescaled.
// Shifting by the running maximum itself would rescale in every other block of a small bag, with a mispredicted branch
// each time.
template <class A>
constexpr A kHeadroom = 16;

// Typed access to a bag's outputs and scratch vectors.
template <class A>
struct ForwardScratch {
    const ForwardBag& bag;

    A* S(int t) const { return scratch_vector<A>(bag, t - 1); }  // t = 1 .. T - 1
    A* temporary() const { return scratch_vector<A>(bag, bag.T - 1); }
    A* sigma(int t) const { return static_cast<A*>(bag.sigma) + (t - 1) * bag.D; }
    SoftmaxStats<A>& stats(int t) const { return static_cast<SoftmaxStats<A>*>(bag.softmax_stats)[t - 1]; }
};

inline void prefetch_next_bag(ForwardBag& bag) {
    if (bag.prefetch_begin >= bag.prefetch_end) return;
    const char* const end = bag.prefetch_begin + bag.prefetch_bytes_per_block;
    for (; bag.prefetch_begin < end; bag.prefetch_begin += kPrefetchStride)
        __builtin_prefetch(bag.prefetch_begin, 0, 2);
}

template <class In, class A, bool kPrefetch>
void forward_rows(ForwardBag& bag, int t, int64_t chunk, void* stage_memory) {
    const ForwardScratch<A> scratch{bag};
    A* stage = static_cast<A*>(stage_memory);
    A* acc = partial_sum<A>(bag, chunk);
    fill(acc, A(0), bag.Dp);
    const int64_t end = chunk_end(bag, chunk);
    if (t == 1) {  // uniform weights: a plain sum, divided by m in forward_merge
        for (int64_t r = chunk_begin(bag, chunk); r < end; r += kBlock) {
            const RowBlock<In, A> block(bag, r, end, stage);
            block_sum<false, kPrefetch, A>(block.rows, nullptr, acc, bag.Dp, bag.prefetch_distance);
        }
        return;
    }
    A* logits = t == bag.T ? static_cast<A*>(bag.weights) : nullptr;
    const A* S = scratch.S(t - 1);
    A shift = -kInfinity<A>, limit = shift;  // sums are of exp(logit - shift); logits above limit raise the shift
    Vec<A> sums{};
    for (int64_t r = chunk_begin(bag, chunk); r < end; r += kBlock) {
        const RowBlock<In, A> block(bag, r, end, stage);
        PerRow<A> b;
        block_dots<1, kPrefetch>(block.rows, &S, &b, bag.Dp, bag.prefetch_distance);
        b = b.first(block.n, -kInfinity<A>);
        A w[kBlock];
        if (logits) {
            b.to(w);
            for (int k = 0; k < block.n; ++k) logits[row_in_memory(bag, r + k)] = w[k];
        }
        if (b.any_above(limit)) {
            const A maximum = b.maximum();
            if (shift > -kInfinity<A>) {
                const A factor = exp_vector(Vec<A>{} + (shift - maximum))[0];
                sums *= factor;
                scale(acc, factor, bag.Dp);
            }
            shift = maximum;
            limit = maximum + kHeadroom<A>;
        }
        b = b.exp_minus(shift);
        for (int k = 0; k < b.kVectors; ++k) sums += b.v[k];
        b.to(w);
        prefetch_next_bag(bag);
        block_sum<true, false, A>(block.rows, w, acc, bag.Dp, 0);
    }
    A* scalars = partial_scalars<A>(bag, chunk);
    scalars[0] = shift;
    scalars[1] = sum_lanes<A>(sums);
}

template <class In, class A>
void forward_chunk(ForwardBag& bag, int t, int64_t chunk, void* stage) {
    bag.prefetch_distance ? forward_rows<In, A, true>(bag, t, chunk, stage)
                          : forward_rows<In, A, false>(bag, t, chunk, stage);
}

template <class In, class A>
void forward_merge(ForwardBag& bag, int t) {
    const ForwardScratch<A> scratch{bag};
    A* sigma = scratch.temporary();
    bag.copied = bag.copy;
    fill(sigma, A(0), bag.Dp);
    if (t == 1) {
        for (int64_t k = 0; k < bag.num_chunks && bag.m; ++k) {
            const A* acc = partial_sum<A>(bag, k);
            for (int64_t d = 0; d < bag.Dp; ++d) sigma[d] += acc[d];
        }
        const A scale = bag.m ? A(1) / static_cast<A>(bag.m) : A(0);
        for (int64_t d = 0; d < bag.Dp; ++d) sigma[d] *= scale;
        scratch.stats(1) = {0, scale};
    } else {
        A maximum = -kInfinity<A>, sum = 0;
        for (int64_t k = 0; k < bag.num_chunks; ++k) {
            const A shift = partial_scalars<A>(bag, k)[0];
            maximum = shift > maximum ? shift : maximum;
        }
        for (int64_t k = 0; k < bag.num_chunks && bag.m; ++k) {
            const A *scalars = partial_scalars<A>(bag, k), *acc = partial_sum<A>(bag, k);
            const A factor = exp_vector(Vec<A>{} + (scalars[0] - maximum))[0];
            sum += factor * scalars[1];
            for (int64_t d = 0; d < bag.Dp; ++d) sigma[d] += factor * acc[d];
        }
        const A scale = bag.m ? 1 / sum : A(0);
        for (int64_t d = 0; d < bag.Dp; ++d) sigma[d] *= scale;
        scratch.stats(t) = {bag.m ? maximum : A(0), scale};
    }
    narrow_row(sigma, scratch.sigma(t), bag.D);
    const A factor = Squash<A>(sigma, bag.Dp).factor();
    if (t < bag.T) {
        A* S = scratch.S(t);
        for (int64_t d = 0; d < bag.Dp; ++d) S[d] = (t > 1 ? scratch.S(t - 1)[d] : A(0)) + factor * sigma[d];
    } else {
        for (int64_t d = 0; d < bag.Dp; ++d) sigma[d] *= factor;
        narrow_row(sigma, static_cast<In*>(bag.bag), bag.D);
    }
}

// Calls visit(row in memory, r) for the real rows r of a chunk, and visit(row in memory, -1) for the rows that are not
// real between it and the chunk before it; the last chunk includes those after it.
template <class Visit>
void for_each_row(const BagRows& bag, int64_t chunk, Visit visit) {
    const int64_t begin = chunk_begin(bag, chunk), end = chunk_end(bag, chunk);
    int64_t row = begin == 0 ? 0 : row_in_memory(bag, begin - 1) + 1;
    for (int64_t r = begin; r < end; ++r, ++row) {
        for (const int64_t real = row_in_memory(bag, r); row < real; ++row) visit(row, -1);
        visit(row, r);
    }
    if (chunk == bag.num_chunks - 1)
        for (; row < bag.rows_in_memory; ++row) visit(row, -1);
}

// Replaces the logits that forward_rows stored in `weights` by the weights.
template <class A>
void weights_chunk(ForwardBag& bag, int64_t chunk) {
    A* weights = static_cast<A*>(bag.weights);
    if (bag.T == 1) {
        for_each_row(bag, chunk, [&](int64_t row, int64_t r) { weights[row] = r < 0 ? A(0) : A(1) / A(bag.m); });
        return;
    }
    const SoftmaxStats<A> stats = ForwardScratch<A>{bag}.stats(bag.T);
    A block[kBlock] = {};  // logits are gathered here, converted once the block is full, and scattered to `rows`
    int64_t rows[kBlock];
    int n = 0;
    const auto flush = [&] {
        PerRow<A>::from(block).softmax(stats).to(block);
        for (int k = 0; k < n; ++k) weights[rows[k]] = block[k];
        n = 0;
    };
    for_each_row(bag, chunk, [&](int64_t row, int64_t r) {
        if (r < 0) {
            weights[row] = 0;
            return;
        }
        block[n] = weights[row];
        rows[n++] = row;
        if (n == kBlock) flush();
    });
    flush();
}

template <class In, class A>
const ForwardKernels& kernels() {
    static const ForwardKernels table = {forward_chunk<In, A>, forward_merge<In, A>, weights_chunk<A>};
    return table;
}

}  // namespace

namespace AMIL_ISA {

const ForwardKernels& adjust_pool_forward_kernels(Dtype dtype) {
    switch (dtype) {
        case Dtype::float64:
            return kernels<double, double>();
        case Dtype::float16:
            return kernels<Half, float>();
        case Dtype::bfloat16:
            return kernels<BFloat16, float>();
        default:
            return kernels<float, float>();
    }
}

}  // namespace AMIL_ISA
}  // namespace amil
