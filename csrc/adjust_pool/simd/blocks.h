// Building blocks of the adjust pooling kernels: operations on vectors, on blocks of kBlock rows, and on the chunks of
// a bag. A is the accumulation type, In the type of the instances.
//
// Included by the sources in this folder only, which are compiled once per instruction set: everything is in an unnamed
// namespace and no templates of the standard library are used (see runtime/vector.h).
#pragma once

#include "adjust_pool/kernels.h"
#include "runtime/vector.h"

namespace amil {
namespace {

template <class A>
constexpr A kInfinity = static_cast<A>(__builtin_huge_val());

// ---- vectors of Dp entries ----

template <class A>
A dot(const A* a, const A* b, int64_t Dp) {
    Vec<A> sum{};
    for (int64_t d = 0; d < Dp; d += kWidth<A>) sum += load(a + d) * load(b + d);
    return sum_lanes<A>(sum);
}

template <class A>
void scale(A* v, A factor, int64_t Dp) {
    for (int64_t d = 0; d < Dp; d += kWidth<A>) store(v + d, load(v + d) * factor);
}

template <class A>
void fill(A* out, A value, int64_t n) {
    for (int64_t i = 0; i < n; ++i) out[i] = value;
}

// Converts a row of D elements to a scratch vector of Dp entries.
template <class In, class A>
void read_vector(const In* row, A* out, const BagRows& bag) {
    widen_row(row, out, bag.D);
    fill(out + bag.D, A(0), bag.Dp - bag.D);
}

// Squared norms below this are computed from a vector scaled by a power of two, since their terms underflow. (Above it,
// the terms that underflow are less than a unit in the last place of the sum.)
template <class A>
constexpr A kTinySquare = static_cast<A>(sizeof(A) == 4 ? 0x1p-64 : 0x1p-900);
template <class A>
constexpr A kTinyScale = static_cast<A>(sizeof(A) == 4 ? 0x1p80 : 0x1p600);

template <class A>
__attribute__((noinline)) A tiny_norm(const A* v, int64_t Dp) {
    Vec<A> sum{};
    for (int64_t d = 0; d < Dp; d += kWidth<A>) {
        const Vec<A> x = load(v + d) * kTinyScale<A>;
        sum += x * x;
    }
    return static_cast<A>(__builtin_sqrt(sum_lanes<A>(sum))) / kTinyScale<A>;
}

// s = squash(sigma) = |sigma|^2 / (1 + |sigma|^2) sigma / |sigma| (Eq. 3) and its Jacobian J.
template <class A>
struct Squash {
    A n2, n;
    Squash(const A* sigma, int64_t Dp) : n2(dot(sigma, sigma, Dp)) {
        n = n2 < kTinySquare<A> ? tiny_norm(sigma, Dp) : static_cast<A>(__builtin_sqrt(n2));
    }
    A factor() const { return n / (1 + n2); }  // s = factor * sigma
    // J' g = factor * g + radial(sigma . g) * sigma; 0 at sigma = 0. No higher power of the norm than n2 is formed, as
    // it would overflow or underflow.
    A radial(A sigma_dot_g) const {
        return n > 0 ? (1 - n2) / (1 + n2) / (1 + n2) * (sigma_dot_g / n) : A(n2 != n2 ? n2 : 0);
    }
};

// ---- blocks of rows ----

// Pointers to kBlock rows of Dp entries each; pointers past the end refer to a row of zeros. Rows of type A whose
// length is a multiple of kBlock are used in place; all others are first gathered, converted and zero-padded.
template <class In, class A>
struct RowBlock {
    const A* rows[kBlock];
    int n;

    RowBlock(const BagRows& bag, int64_t first, int64_t end, A* stage) {
        n = static_cast<int>(end - first < kBlock ? end - first : kBlock);
        const In* f = static_cast<const In*>(bag.f);
        const A* zeros = stage + kBlock * bag.Dp;
        const bool in_place = __is_same(In, A) && bag.D == bag.Dp;
        for (int r = 0; r < kBlock; ++r) {
            if (r >= n) {
                rows[r] = zeros;
                continue;
            }
            const int64_t i = bag.index ? bag.index[first + r] : first + r;
            const In* row = f + i * bag.row_stride;
            if (in_place) {
                rows[r] = reinterpret_cast<const A*>(row);
            } else if (bag.copied) {
                rows[r] = static_cast<const A*>(bag.copy) + (first + r) * bag.Dp;
            } else {
                A* copy = bag.copy ? static_cast<A*>(bag.copy) + (first + r) * bag.Dp : stage + r * bag.Dp;
                read_vector(row, copy, bag);
                rows[r] = copy;
            }
        }
    }
};

// Number of rows whose dot products are computed together: enough independent sums to hide the latency of a
// multiply-add, few enough to fit the registers.
constexpr int kDotRows = kVectorBytes == 64 ? 8 : 4;

// Softmax of the logits b of one bag and iteration: w_i = exp(b_i - shift) scale. The shift is close to the largest
// logit, and scale = 1 / sum_i exp(b_i - shift). (Their combination to a single number, the log-sum-exp, would lose
// log(1 / scale) to rounding where the logits are large.)
template <class A>
struct SoftmaxStats {
    A shift, scale;
};

// One number for each row of a block.
template <class A>
struct PerRow {
    static constexpr int kVectors = kBlock / kWidth<A>;
    Vec<A> v[kVectors];

    void to(A* out) const {
        for (int k = 0; k < kVectors; ++k) store(out + k * kWidth<A>, v[k]);
    }
    static PerRow from(const A* in) {
        PerRow result;
        for (int k = 0; k < kVectors; ++k) result.v[k] = load(in + k * kWidth<A>);
        return result;
    }
    // Keeps the first n numbers and sets the others to `value`.
    PerRow first(int n, A value) const {
        if (n == kBlock) return *this;
        A all[kBlock];
        to(all);
        for (int k = n; k < kBlock; ++k) all[k] = value;
        return from(all);
    }
    PerRow exp_minus(A shift) const {
        PerRow result;
        for (int k = 0; k < kVectors; ++k) result.v[k] = exp_vector(v[k] - shift);
        return result;
    }
    // The weights of rows whose logits these are.
    PerRow softmax(const SoftmaxStats<A>& stats) const {
        PerRow result = exp_minus(stats.shift);
        for (int k = 0; k < kVectors; ++k) result.v[k] *= stats.scale;
        return result;
    }
    A sum() const {
        Vec<A> total = v[0];
        for (int k = 1; k < kVectors; ++k) total += v[k];
        return sum_lanes<A>(total);
    }
    A maximum() const {
        A all[kBlock];
        to(all);
        A highest = all[0];
        for (int k = 1; k < kBlock; ++k) highest = all[k] > highest ? all[k] : highest;
        return highest;
    }
    bool any_above(A value) const {
        bool any = false;
        for (int k = 0; k < kVectors; ++k) any |= any_greater<A>(v[k], Vec<A>{} + value);
        return any;
    }
};

// Prefetches the address `distance` elements after p (BagRows::prefetch_distance).
template <bool kPrefetch, class A>
inline void prefetch(const A* p, int64_t distance) {
    if constexpr (kPrefetch) __builtin_prefetch(p + distance, 0, 2);
}

// out[q] = dot products of the rows with vectors[q]
template <int Q, bool kPrefetch, class A>
inline void block_dots(const A* const* rows, const A* const* vectors, PerRow<A>* out, int64_t Dp, int64_t distance) {
    constexpr int W = kWidth<A>;
    constexpr int kGroups = kBlock / kDotRows;
    constexpr int kLeft = kDotRows > W ? kDotRows / W : 1;        // vectors that a group of rows is folded to
    constexpr int kLevel = kDotRows >= W ? 0 : W / 2 / kDotRows;  // fold width at which folding then continues
    Vec<A> folded[Q][kGroups * kLeft];
    for (int group = 0; group < kGroups; ++group) {
        Vec<A> sums[Q][kDotRows] = {};
        for (int64_t d = 0; d < Dp; d += W) {
            Vec<A> v[Q];
            for (int q = 0; q < Q; ++q) v[q] = load(vectors[q] + d);
            for (int r = 0; r < kDotRows; ++r) {
                const A* row = rows[group * kDotRows + r] + d;
                const Vec<A> x = load(row);
                prefetch<kPrefetch>(row, distance);
                for (int q = 0; q < Q; ++q) sums[q][r] += x * v[q];
            }
        }
        for (int q = 0; q < Q; ++q) {
            fold_all<A, kDotRows, W / 2>(sums[q]);
            for (int k = 0; k < kLeft; ++k) folded[q][group * kLeft + k] = sums[q][k];
        }
    }
    for (int q = 0; q < Q; ++q) {
        fold_all<A, kGroups * kLeft, kLevel>(folded[q]);
        for (int k = 0; k < PerRow<A>::kVectors; ++k) out[q].v[k] = folded[q][k];
    }
}

// acc += sum_r w[r] rows[r], or the plain sum without kWeighted. G vectors of acc, starting at column d, stay in
// registers during the loop over the rows.
template <bool kWeighted, int G, bool kPrefetch, class A>
inline void block_sum_columns(const A* const* rows, const A* w, A* acc, int64_t d, int64_t distance) {
    Vec<A> sums[G];
    for (int g = 0; g < G; ++g) sums[g] = load(acc + d + g * kWidth<A>);
#pragma GCC unroll 4
    for (int r = 0; r < kBlock; ++r) {
        const A* row = rows[r] + d;
        for (int g = 0; g < G; ++g) {
            const Vec<A> x = load(row + g * kWidth<A>);
            prefetch<kPrefetch>(row + g * kWidth<A>, distance);
            sums[g] += kWeighted ? x * w[r] : x;
        }
    }
    for (int g = 0; g < G; ++g) store(acc + d + g * kWidth<A>, sums[g]);
}
template <bool kWeighted, bool kPrefetch, class A>
inline void block_sum(const A* const* rows, const A* w, A* acc, int64_t Dp, int64_t distance) {
    constexpr int G = kVectorBytes == 64 ? 8 : 4;
    constexpr int64_t kColumns = G * kWidth<A>;
    int64_t d = 0;
    for (; d + kColumns <= Dp; d += kColumns) block_sum_columns<kWeighted, G, kPrefetch>(rows, w, acc, d, distance);
    for (; d < Dp; d += kWidth<A>) block_sum_columns<kWeighted, 1, kPrefetch>(rows, w, acc, d, distance);
}

// ---- chunks of a bag ----

inline int64_t chunk_begin(const BagRows& bag, int64_t chunk) { return chunk * bag.chunk_rows; }
inline int64_t chunk_end(const BagRows& bag, int64_t chunk) {
    const int64_t end = (chunk + 1) * bag.chunk_rows;
    return end < bag.m ? end : bag.m;
}

// A chunk's partial result: kBlock scalars, of which forward uses two (the shift of the exponentials and their sum) and
// backward one (sum_j w_j v_j, later the sum of beta), then a vector of Dp entries, the weighted sum of rows.
template <class A>
inline A* partial_scalars(const BagRows& bag, int64_t chunk) {
    return static_cast<A*>(bag.partials) + chunk * (kBlock + bag.Dp);
}
template <class A>
inline A* partial_sum(const BagRows& bag, int64_t chunk) {
    return partial_scalars<A>(bag, chunk) + kBlock;
}

// Row k of BagRows::vectors.
template <class A>
inline A* scratch_vector(const BagRows& bag, int64_t k) {
    return static_cast<A*>(bag.vectors) + k * bag.Dp;
}

// Position in memory of real row r.
inline int64_t row_in_memory(const BagRows& bag, int64_t r) { return bag.index ? bag.index[r] : r; }

}  // namespace
}  // namespace amil
