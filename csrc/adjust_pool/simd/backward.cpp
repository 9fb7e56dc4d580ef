// Backward pass of adjust pooling, compiled once per instruction set; see kernels.h for the derivation.
#include "adjust_pool/kernels.h"
#include "adjust_pool/simd/blocks.h"
#include "runtime/vector.h"

namespace amil {
namespace {

// Typed access to a bag's inputs and scratch.
template <class A>
struct BackwardScratch {
    const BackwardBag& bag;

    // Stored as e^2, S_1, e^3, S_2, ..., e^T, S_{T-1}, e^1: up to e^1 in the order of their coefficients in dL/df.
    A* S(int t) const { return scratch_vector<A>(bag, 2 * t - 1); }                               // t = 1 .. T - 1
    A* e(int t) const { return scratch_vector<A>(bag, t == 1 ? 2 * (bag.T - 1) : 2 * (t - 2)); }  // t = 1 .. T
    A* sum() const { return scratch_vector<A>(bag, 2 * bag.T - 1); }  // running sum of dL/dS
    A* temporary() const { return scratch_vector<A>(bag, 2 * bag.T); }

    A* w(int t) const { return static_cast<A*>(bag.coefficients) + 2 * (t - 2) * bag.m; }  // t = 2 .. T
    A* beta(int t) const { return w(t) + bag.m; }

    const A* sigma(int t) const { return static_cast<const A*>(bag.sigma) + (t - 1) * bag.D; }
    const SoftmaxStats<A>& stats(int t) const { return static_cast<const SoftmaxStats<A>*>(bag.softmax_stats)[t - 1]; }
};

// Computes e^t = J(sigma^t)' g and sigma^t . e^t from sigma^t, which is in the temporary, and g = dL/ds^t.
template <class A>
void set_e(BackwardBag& bag, int t, const A* g) {
    const BackwardScratch<A> scratch{bag};
    const A* sigma = scratch.temporary();
    A* e = scratch.e(t);
    const Squash<A> squash(sigma, bag.Dp);
    const A c = squash.factor(), k = squash.radial(dot(sigma, g, bag.Dp));
    for (int64_t d = 0; d < bag.Dp; ++d) e[d] = c * g[d] + k * sigma[d];
    bag.sigma_dot_e = dot(sigma, e, bag.Dp);
}

template <class In, class A>
void backward_begin(BackwardBag& bag) {
    const BackwardScratch<A> scratch{bag};
    A* sigma = scratch.temporary();
    for (int t = 1; t <= bag.T; ++t) {
        read_vector(scratch.sigma(t), sigma, bag);
        if (t == bag.T) break;
        const A factor = Squash<A>(sigma, bag.Dp).factor();
        A* S = scratch.S(t);
        for (int64_t d = 0; d < bag.Dp; ++d) S[d] = (t > 1 ? scratch.S(t - 1)[d] : A(0)) + factor * sigma[d];
    }
    A* g = scratch.sum();
    if (bag.grad_bag)
        read_vector(static_cast<const In*>(bag.grad_bag), g, bag);
    else
        fill(g, A(0), bag.Dp);
    set_e(bag, bag.T, g);
    fill(g, A(0), bag.Dp);
    bag.weights_dot = 0;
}

template <class A>
inline A grad_weight(const BackwardBag& bag, int64_t r) {
    return static_cast<const A*>(bag.grad_weights)[row_in_memory(bag, r)];
}

// A partial sum_j w_j v_j of the last iteration; backward_rows needs the total before it can compute any beta.
template <class In, class A>
void weights_dot_chunk(BackwardBag& bag, int64_t chunk, void* stage) {
    const BackwardScratch<A> scratch{bag};
    const A* S = scratch.S(bag.T - 1);
    const int64_t end = chunk_end(bag, chunk);
    A sum = 0;
    for (int64_t r = chunk_begin(bag, chunk); r < end; r += kBlock) {
        const RowBlock<In, A> block(bag, r, end, static_cast<A*>(stage));
        PerRow<A> b;
        block_dots<1, false>(block.rows, &S, &b, bag.Dp, 0);
        A w[kBlock];
        b.softmax(scratch.stats(bag.T)).to(w);
        for (int k = 0; k < block.n; ++k) sum += w[k] * grad_weight<A>(bag, r + k);
    }
    partial_scalars<A>(bag, chunk)[0] = sum;
}

template <class A>
void weights_dot_merge(BackwardBag& bag) {
    A sum = 0;
    for (int64_t k = 0; k < bag.num_chunks; ++k) sum += partial_scalars<A>(bag, k)[0];
    bag.weights_dot = sum;
    bag.copied = bag.copy;
}

// The rows of dL/df for one block: out[r] = base + sum_p coefficients[p * m + r] vectors[p * Dp ...].
template <class A>
struct GradientRows {
    const A* base;
    const A* coefficients;
    const A* vectors;
    int count;  // number of terms p
    int64_t m, Dp;

    // kCount < 0: the count is known only at run time. Writes G vectors from column d on.
    template <int kCount, int G, bool kNonTemporal>
    void write_columns(A* const* out, int n, int64_t d) const {
        constexpr int W = kWidth<A>;
        Vec<A> b[G], v[kCount < 1 ? 1 : kCount][G];
        for (int g = 0; g < G; ++g) b[g] = load(base + d + g * W);
        for (int p = 0; p < kCount; ++p)
            for (int g = 0; g < G; ++g) v[p][g] = load(vectors + p * Dp + d + g * W);
        for (int r = 0; r < n; ++r) {
            Vec<A> x[G];
            for (int g = 0; g < G; ++g) x[g] = b[g];
            for (int p = 0; p < (kCount < 0 ? count : kCount); ++p)
                for (int g = 0; g < G; ++g)
                    x[g] += (kCount < 0 ? load(vectors + p * Dp + d + g * W) : v[kCount < 0 ? 0 : p][g]) *
                            coefficients[p * m + r];
            for (int g = 0; g < G; ++g) {
                if constexpr (kNonTemporal)
                    store_non_temporal(out[r] + d + g * W, x[g]);
                else
                    store(out[r] + d + g * W, x[g]);
            }
        }
    }
    template <int kCount, bool kNonTemporal>
    void write(A* const* out, int n) const {
        constexpr int W = kWidth<A>, G = kVectorBytes == 64 ? 4 : 2;
        int64_t d = 0;
        for (; d + G * W <= Dp; d += G * W) write_columns<kCount, G, kNonTemporal>(out, n, d);
        for (; d < Dp; d += W) write_columns<kCount, 1, kNonTemporal>(out, n, d);
    }
    template <int kCount>
    void write(A* const* out, int n, bool non_temporal) const {
        non_temporal ? write<kCount, true>(out, n) : write<kCount, false>(out, n);
    }
};

template <class In>
inline void zero_rows(const BackwardBag& bag, int64_t begin, int64_t end) {
    if (begin < end)
        memset(static_cast<void*>(static_cast<In*>(bag.grad_f) + begin * bag.D), 0, (end - begin) * bag.D * sizeof(In));
}

template <class In, class A>
void backward_write(const BackwardBag& bag, int64_t begin, int64_t end, void* stage) {
    const BackwardScratch<A> scratch{bag};
    const int t = bag.detach_routing ? bag.T : 2;  // the first iteration whose weights carry a gradient
    const int count = bag.T == 1 ? 0 : bag.detach_routing ? 1 : 2 * (bag.T - 1);
    GradientRows<A> gradient{scratch.temporary(), scratch.w(t), scratch.e(t), count, bag.m, bag.Dp};
    const bool in_place = __is_same(In, A) && bag.D == bag.Dp;
    const bool aligned = reinterpret_cast<uintptr_t>(bag.grad_f) % kVectorBytes == 0;
    const bool non_temporal = bag.non_temporal_stores && in_place && aligned;
    int64_t row = begin == 0 ? 0 : row_in_memory(bag, begin - 1) + 1;
    for (int64_t r = begin; r < end; r += kBlock) {
        In* rows[kBlock];
        A* out[kBlock];
        const int n = static_cast<int>(end - r < kBlock ? end - r : kBlock);
        for (int k = 0; k < n; ++k, ++row) {
            const int64_t real = row_in_memory(bag, r + k);
            zero_rows<In>(bag, row, real);
            row = real;
            rows[k] = static_cast<In*>(bag.grad_f) + row * bag.D;
            out[k] = in_place ? reinterpret_cast<A*>(rows[k]) : static_cast<A*>(stage) + k * bag.Dp;
        }
        gradient.coefficients = scratch.w(t) + r;
        switch (count) {
            case 0:
                gradient.template write<0>(out, n, non_temporal);
                break;
            case 2:
                gradient.template write<2>(out, n, non_temporal);
                break;
            case 4:
                gradient.template write<4>(out, n, non_temporal);
                break;
            default:
                gradient.template write<-1>(out, n, non_temporal);
        }
        if (!in_place)
            for (int k = 0; k < n; ++k) narrow_row(out[k], rows[k], bag.D);
    }
    if (end == bag.m) zero_rows<In>(bag, row, bag.rows_in_memory);
}

template <class In, class A>
void write_overlapped(OverlappedWrite previous, void* stage) {
    BackwardBag& bag = *previous.bag;
    if (bag.rows_written >= bag.m) return;
    const int64_t end = bag.rows_written + previous.blocks * kBlock;
    const int64_t stop = end < bag.m ? end : bag.m;
    backward_write<In, A>(bag, bag.rows_written, stop, stage);
    bag.rows_written = stop;
}

template <class In, class A, bool kPrefetch>
void backward_rows(BackwardBag& bag, int t, int64_t chunk, void* stage, OverlappedWrite previous) {
    const BackwardScratch<A> scratch{bag};
    const bool with_grad_weights = t == bag.T && bag.grad_weights && !bag.detach_routing;
    A* acc = partial_sum<A>(bag, chunk);
    fill(acc, A(0), bag.Dp);
    const A* vectors[2] = {scratch.S(t - 1), scratch.e(t)};
    const SoftmaxStats<A> stats = scratch.stats(t);
    const A c = static_cast<A>(bag.sigma_dot_e + (with_grad_weights ? bag.weights_dot : 0));
    const int64_t end = chunk_end(bag, chunk);
    PerRow<A> betas{};
    for (int64_t r = chunk_begin(bag, chunk); r < end; r += kBlock) {
        const RowBlock<In, A> block(bag, r, end, static_cast<A*>(stage));
        PerRow<A> dots[2];
        block_dots<2, kPrefetch>(block.rows, vectors, dots, bag.Dp, bag.prefetch_distance);
        const PerRow<A> w = dots[0].first(block.n, -kInfinity<A>).softmax(stats);
        A beta[kBlock];
        if (with_grad_weights) {
            dots[1].to(beta);
            for (int k = 0; k < block.n; ++k) beta[k] += grad_weight<A>(bag, r + k);
            dots[1] = PerRow<A>::from(beta);
        }
        for (int k = 0; k < w.kVectors; ++k) betas.v[k] += dots[1].v[k] = w.v[k] * (dots[1].v[k] - c);
        dots[1].to(beta);
        if (block.n == kBlock) {
            w.to(scratch.w(t) + r);
            dots[1].to(scratch.beta(t) + r);
        } else {
            A last[kBlock];
            w.to(last);
            memcpy(scratch.w(t) + r, last, block.n * sizeof(A));
            memcpy(scratch.beta(t) + r, beta, block.n * sizeof(A));
        }
        if (!bag.detach_routing) block_sum<true, false, A>(block.rows, beta, acc, bag.Dp, 0);
        if (previous.bag) write_overlapped<In, A>(previous, stage);
    }
    partial_scalars<A>(bag, chunk)[0] = betas.sum();
}

template <class In, class A>
void backward_chunk(BackwardBag& bag, int t, int64_t chunk, void* stage, OverlappedWrite previous) {
    bag.prefetch_distance ? backward_rows<In, A, true>(bag, t, chunk, stage, previous)
                          : backward_rows<In, A, false>(bag, t, chunk, stage, previous);
}

template <class A>
void backward_merge(BackwardBag& bag, int t) {
    const BackwardScratch<A> scratch{bag};
    bag.copied = bag.copy;
    A *sum = scratch.sum(), *e = scratch.e(t), delta = 0;
    for (int64_t k = 0; k < bag.num_chunks; ++k) {
        const A* acc = partial_sum<A>(bag, k);
        for (int64_t d = 0; d < bag.Dp; ++d) sum[d] += acc[d];
        delta += partial_scalars<A>(bag, k)[0];
    }
    const A *sigma = scratch.temporary(), *S = scratch.S(t - 1);
    for (int64_t d = 0; d < bag.Dp; ++d) {
        sum[d] -= delta * sigma[d];
        e[d] -= delta * S[d];
    }
    read_vector(scratch.sigma(t - 1), scratch.temporary(), bag);
    set_e(bag, t - 1, sum);
}

// Writes e^1 / m, the term of dL/df that all instances share, to the temporary. With detached routing only iteration T
// has a gradient, so the term is 0 unless T = 1.
template <class A>
void backward_end(BackwardBag& bag) {
    const BackwardScratch<A> scratch{bag};
    A* base = scratch.temporary();
    const bool shared = bag.m && (bag.T == 1 || !bag.detach_routing);
    const A scale = shared ? A(1) / static_cast<A>(bag.m) : A(0);
    for (int64_t d = 0; d < bag.Dp; ++d) base[d] = shared ? scale * scratch.e(1)[d] : A(0);
}

template <class In, class A>
const BackwardKernels& kernels() {
    static const BackwardKernels table = {
        backward_begin<In, A>, weights_dot_chunk<In, A>, weights_dot_merge<A>,  backward_chunk<In, A>,
        backward_merge<A>,     backward_end<A>,          backward_write<In, A>,
    };
    return table;
}

}  // namespace

namespace AMIL_ISA {

const BackwardKernels& adjust_pool_backward_kernels(Dtype dtype) {
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
