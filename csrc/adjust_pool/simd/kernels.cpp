// Derivation, arguments and scratch: ../adjust_pool_kernels.h. Compiled once per instruction set; A is the accumulation
// type, In the type of the instances. A block is kBlock rows; where rows are of type A and whole vectors long they are
// used in place, otherwise they are first copied (gathered, widened, padded with zeros) to the stage.
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

// The D entries of a tensor's row as a vector of scratch.
template <class In, class A>
void read_vector(const In* row, A* out, const BagWork& bag) {
    widen_row(row, out, bag.D);
    fill(out + bag.D, A(0), bag.Dp - bag.D);
}

template <class A>
struct Squash {
    A n2, n;
    explicit Squash(A squared_norm) : n2(squared_norm), n(__builtin_sqrt(squared_norm)) {}
    A factor() const { return n / (1 + n2); }  // s = factor * sigma
    // The coefficient of (sigma . g) sigma in J' g = factor * g + ...; 0 at sigma = 0.
    A curvature() const { return n2 > 0 ? (1 - n2) / ((1 + n2) * (1 + n2) * n) : A(n2 != n2 ? n2 : 0); }
};

// ---- blocks of rows ----

// Pointers to kBlock rows of Dp entries each; rows past the end point to zeros.
template <class In, class A>
struct Block {
    const A* rows[kBlock];
    int n;

    Block(const BagWork& bag, int64_t first, int64_t end, A* stage) {
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

// Rows whose dot products are taken together: enough independent sums to hide the latency of a multiply-add, few enough
// for the registers.
constexpr int kDotRows = kVectorBytes == 64 ? 8 : 4;

// kBlock numbers, one for each row of a block.
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
    // The first n kept, the others set to value.
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

// Asks for what is `ahead` entries behind an address, if there is such a distance: see BagWork::ahead.
template <bool kAhead, class A>
inline void fetch(const A* p, int64_t ahead) {
    if constexpr (kAhead) __builtin_prefetch(p + ahead, 0, 2);
}

// out[q] = the dot products of the rows with vectors[q]
template <int Q, bool kAhead, class A>
inline void block_dots(const A* const* rows, const A* const* vectors, PerRow<A>* out, int64_t Dp, int64_t ahead) {
    constexpr int W = kWidth<A>;
    constexpr int kGroups = kBlock / kDotRows;
    constexpr int kLeft = kDotRows > W ? kDotRows / W : 1;        // vectors that a group of rows folds to
    constexpr int kLevel = kDotRows >= W ? 0 : W / 2 / kDotRows;  // and how wide they then are to be folded on
    Vec<A> folded[Q][kGroups * kLeft];
    for (int group = 0; group < kGroups; ++group) {
        Vec<A> sums[Q][kDotRows] = {};
        for (int64_t d = 0; d < Dp; d += W) {
            Vec<A> v[Q];
            for (int q = 0; q < Q; ++q) v[q] = load(vectors[q] + d);
            for (int r = 0; r < kDotRows; ++r) {
                const A* row = rows[group * kDotRows + r] + d;
                const Vec<A> x = load(row);
                fetch<kAhead>(row, ahead);
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

// acc += sum_r w[r] rows[r], or without w the plain sum. Four or eight vectors of acc stay in registers while the rows
// go by.
template <bool kWeighted, int G, bool kAhead, class A>
inline void block_sum_columns(const A* const* rows, const A* w, A* acc, int64_t d, int64_t ahead) {
    Vec<A> sums[G];
    for (int g = 0; g < G; ++g) sums[g] = load(acc + d + g * kWidth<A>);
#pragma GCC unroll 4
    for (int r = 0; r < kBlock; ++r) {
        const A* row = rows[r] + d;
        for (int g = 0; g < G; ++g) {
            const Vec<A> x = load(row + g * kWidth<A>);
            fetch<kAhead>(row + g * kWidth<A>, ahead);
            sums[g] += kWeighted ? x * w[r] : x;
        }
    }
    for (int g = 0; g < G; ++g) store(acc + d + g * kWidth<A>, sums[g]);
}
template <bool kWeighted, bool kAhead, class A>
inline void block_sum(const A* const* rows, const A* w, A* acc, int64_t Dp, int64_t ahead) {
    constexpr int G = kVectorBytes == 64 ? 8 : 4;
    int64_t d = 0;
    for (; d + G * kWidth<A> <= Dp; d += G * kWidth<A>) block_sum_columns<kWeighted, G, kAhead>(rows, w, acc, d, ahead);
    for (; d < Dp; d += kWidth<A>) block_sum_columns<kWeighted, 1, kAhead>(rows, w, acc, d, ahead);
}

// ---- where things are in a bag's scratch ----

template <class A>
struct Scratch {
    const BagWork& bag;

    A* vector(int64_t k) const { return static_cast<A*>(bag.vectors) + k * bag.Dp; }
    // e^2, S_1, e^3, S_2, ..., e^T, S_{T-1}: in the order of the coefficients that they are multiplied by in the end
    A* S(int t) const { return vector(2 * t - 1); }                               // t = 1 .. T - 1
    A* e(int t) const { return vector(t == 1 ? 2 * (bag.T - 1) : 2 * (t - 2)); }  // t = 1 .. T
    A* sum() const { return vector(2 * bag.T - 1); }
    A* spare() const { return vector(2 * bag.T); }

    // reference, sum, then at kBlock the weighted sum of rows
    A* partial(int64_t chunk) const { return static_cast<A*>(bag.partials) + chunk * (kBlock + bag.Dp); }
    A* w(int t) const { return static_cast<A*>(bag.coefficients) + 2 * (t - 2) * bag.m; }  // t = 2 .. T
    A* beta(int t) const { return w(t) + bag.m; }

    A* sigma(int t) const { return static_cast<A*>(const_cast<void*>(bag.sigma)) + (t - 1) * bag.D; }
    A& lse(int t) const { return static_cast<A*>(const_cast<void*>(bag.lse))[t - 1]; }
};

int64_t chunk_begin(const BagWork& bag, int64_t chunk) { return chunk * bag.chunk_rows; }
int64_t chunk_end(const BagWork& bag, int64_t chunk) {
    const int64_t end = (chunk + 1) * bag.chunk_rows;
    return end < bag.m ? end : bag.m;
}

// Calls visit(row in memory, position among the real rows, or -1 for a row that is not real) for the rows of a chunk
// and those between it and the chunk before it; the last chunk has the rows after it too.
template <class Visit>
void for_each_row(const BagWork& bag, int64_t chunk, Visit visit) {
    const int64_t begin = chunk_begin(bag, chunk), end = chunk_end(bag, chunk);
    int64_t row = begin == 0 ? 0 : (bag.index ? bag.index[begin - 1] : begin - 1) + 1;
    for (int64_t r = begin; r < end; ++r, ++row) {
        for (const int64_t real = bag.index ? bag.index[r] : r; row < real; ++row) visit(row, -1);
        visit(row, r);
    }
    if (chunk == bag.chunks - 1)
        for (; row < bag.rows_in_memory; ++row) visit(row, -1);
}

// ---- forward ----

// Logits may be above what their exponentials are taken relative to by this much, about 10^7, before the sums are
// rescaled: with the running maximum itself every other block of a small bag would rescale, and be mispredicted.
template <class A>
constexpr A kHeadroom = 16;

inline void fetch_next_bag(BagWork& bag) {
    if (bag.fetch >= bag.fetch_end) return;
    const char* const end = bag.fetch + bag.fetch_bytes;
    for (; bag.fetch < end; bag.fetch += kFetchStride) __builtin_prefetch(bag.fetch, 0, 2);
}

template <class In, class A, bool kAhead>
void forward_rows(BagWork& bag, int t, int64_t chunk, void* stage_memory) {
    const Scratch<A> scratch{bag};
    A* stage = static_cast<A*>(stage_memory);
    A* partial = scratch.partial(chunk);
    A* acc = partial + kBlock;
    fill(acc, A(0), bag.Dp);
    const int64_t end = chunk_end(bag, chunk);
    if (t == 1) {
        for (int64_t r = chunk_begin(bag, chunk); r < end; r += kBlock) {
            const Block<In, A> block(bag, r, end, stage);
            block_sum<false, kAhead, A>(block.rows, nullptr, acc, bag.Dp, bag.ahead);
        }
        return;
    }
    A* logits = t == bag.T ? static_cast<A*>(bag.weights) : nullptr;
    const A* S = scratch.S(t - 1);
    A reference = -kInfinity<A>, highest = reference;  // exponentials are of logits less reference
    Vec<A> sums{};
    for (int64_t r = chunk_begin(bag, chunk); r < end; r += kBlock) {
        const Block<In, A> block(bag, r, end, stage);
        PerRow<A> b;
        block_dots<1, kAhead>(block.rows, &S, &b, bag.Dp, bag.ahead);
        b = b.first(block.n, -kInfinity<A>);
        A w[kBlock];
        if (logits) {
            b.to(w);
            for (int k = 0; k < block.n; ++k) logits[bag.index ? bag.index[r + k] : r + k] = w[k];
        }
        if (b.any_above(highest)) {
            const A maximum = b.maximum();
            if (reference > -kInfinity<A>) {
                const A factor = exp_vector(Vec<A>{} + (reference - maximum))[0];
                sums *= factor;
                scale(acc, factor, bag.Dp);
            }
            reference = maximum;
            highest = maximum + kHeadroom<A>;
        }
        b = b.exp_minus(reference);
        for (int k = 0; k < b.kVectors; ++k) sums += b.v[k];
        b.to(w);
        fetch_next_bag(bag);
        block_sum<true, false, A>(block.rows, w, acc, bag.Dp, 0);
    }
    partial[0] = reference;
    partial[1] = sum_lanes<A>(sums);
}
template <class In, class A>
void forward_chunk(BagWork& bag, int t, int64_t chunk, void* stage) {
    bag.ahead ? forward_rows<In, A, true>(bag, t, chunk, stage) : forward_rows<In, A, false>(bag, t, chunk, stage);
}

template <class In, class A>
void forward_merge(BagWork& bag, int t) {
    const Scratch<A> scratch{bag};
    A* sigma = scratch.spare();
    bag.copied = bag.copy;
    fill(sigma, A(0), bag.Dp);
    if (t == 1) {
        for (int64_t k = 0; k < bag.chunks && bag.m; ++k) {
            const A* acc = scratch.partial(k) + kBlock;
            for (int64_t d = 0; d < bag.Dp; ++d) sigma[d] += acc[d];
        }
        const A scale = bag.m ? A(1) / static_cast<A>(bag.m) : A(0);
        for (int64_t d = 0; d < bag.Dp; ++d) sigma[d] *= scale;
        scratch.lse(1) = bag.m ? static_cast<A>(__builtin_log(static_cast<double>(bag.m))) : A(0);
    } else {
        A maximum = -kInfinity<A>, sum = 0;
        for (int64_t k = 0; k < bag.chunks; ++k)
            maximum = scratch.partial(k)[0] > maximum ? scratch.partial(k)[0] : maximum;
        for (int64_t k = 0; k < bag.chunks && bag.m; ++k) {
            const A* partial = scratch.partial(k);
            const A factor = exp_vector(Vec<A>{} + (partial[0] - maximum))[0];
            sum += factor * partial[1];
            for (int64_t d = 0; d < bag.Dp; ++d) sigma[d] += factor * partial[kBlock + d];
        }
        const A scale = bag.m ? 1 / sum : A(0);
        for (int64_t d = 0; d < bag.Dp; ++d) sigma[d] *= scale;
        scratch.lse(t) = bag.m ? maximum + static_cast<A>(__builtin_log(static_cast<double>(sum))) : A(0);
    }
    narrow_row(sigma, scratch.sigma(t), bag.D);
    const A factor = Squash<A>(dot(sigma, sigma, bag.Dp)).factor();
    if (t < bag.T) {
        A* S = scratch.S(t);
        for (int64_t d = 0; d < bag.Dp; ++d) S[d] = (t > 1 ? scratch.S(t - 1)[d] : A(0)) + factor * sigma[d];
    } else if (bag.bag) {
        for (int64_t d = 0; d < bag.Dp; ++d) sigma[d] *= factor;
        narrow_row(sigma, static_cast<In*>(bag.bag), bag.D);
    }
}

template <class A>
void weights_chunk(BagWork& bag, int64_t chunk) {
    const Scratch<A> scratch{bag};
    A* weights = static_cast<A*>(bag.weights);
    if (bag.T == 1) {
        for_each_row(bag, chunk, [&](int64_t row, int64_t r) { weights[row] = r < 0 ? A(0) : A(1) / A(bag.m); });
        return;
    }
    const A lse = scratch.lse(bag.T);
    A block[kBlock] = {};  // logits became weights when the block was full; then they go where they came from
    int64_t rows[kBlock];
    int n = 0;
    const auto flush = [&] {
        PerRow<A>::from(block).exp_minus(lse).to(block);
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

// ---- backward ----

// Sets e^t from sigma^t, which is in spare, and g = dL/ds^t, and what else the pass of iteration t needs.
template <class A>
void set_e(BagWork& bag, int t, const A* g) {
    const Scratch<A> scratch{bag};
    const A* sigma = scratch.spare();
    A* e = scratch.e(t);
    const Squash<A> squash(dot(sigma, sigma, bag.Dp));
    const A c = squash.factor(), k = squash.curvature() * dot(sigma, g, bag.Dp);
    for (int64_t d = 0; d < bag.Dp; ++d) e[d] = c * g[d] + k * sigma[d];
    bag.sigma_dot_e = dot(sigma, e, bag.Dp);
}

template <class In, class A>
void backward_begin(BagWork& bag) {
    const Scratch<A> scratch{bag};
    A* sigma = scratch.spare();
    for (int t = 1; t <= bag.T; ++t) {
        read_vector(static_cast<const A*>(scratch.sigma(t)), sigma, bag);
        if (t == bag.T) break;
        const A factor = Squash<A>(dot(sigma, sigma, bag.Dp)).factor();
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
inline A grad_weight(const BagWork& bag, int64_t r) {
    return static_cast<const A*>(bag.grad_weights)[bag.index ? bag.index[r] : r];
}

// A partial sum_j w_j v_j of the last iteration, which the coefficients beta of backward_chunk need beforehand.
template <class In, class A>
void backward_weights_chunk(BagWork& bag, int64_t chunk, void* stage) {
    const Scratch<A> scratch{bag};
    const A* S = scratch.S(bag.T - 1);
    const int64_t end = chunk_end(bag, chunk);
    A sum = 0;
    for (int64_t r = chunk_begin(bag, chunk); r < end; r += kBlock) {
        const Block<In, A> block(bag, r, end, static_cast<A*>(stage));
        PerRow<A> b;
        block_dots<1, false>(block.rows, &S, &b, bag.Dp, 0);
        A w[kBlock];
        b.exp_minus(scratch.lse(bag.T)).to(w);
        for (int k = 0; k < block.n; ++k) sum += w[k] * grad_weight<A>(bag, r + k);
    }
    scratch.partial(chunk)[0] = sum;
}

template <class A>
void backward_weights_merge(BagWork& bag) {
    A sum = 0;
    for (int64_t k = 0; k < bag.chunks; ++k) sum += Scratch<A>{bag}.partial(k)[0];
    bag.weights_dot = sum;
    bag.copied = bag.copy;
}

// The sum over pairs of coefficient and vector in dL/df, for the rows of one block:
// out[r] = base + sum_p coefficients[p * m + r] vectors[p * Dp].
template <class A>
struct Pairs {
    const A* base;
    const A* coefficients;
    const A* vectors;
    int count;
    int64_t m, Dp;

    // kCount < 0: a count known only at run time. G vectors from column d on.
    template <int kCount, int G, bool kPastCache>
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
                if constexpr (kPastCache)
                    store_past_cache(out[r] + d + g * W, x[g]);
                else
                    store(out[r] + d + g * W, x[g]);
            }
        }
    }
    template <int kCount, bool kPastCache>
    void write(A* const* out, int n) const {
        constexpr int W = kWidth<A>, G = kVectorBytes == 64 ? 4 : 2;
        int64_t d = 0;
        for (; d + G * W <= Dp; d += G * W) write_columns<kCount, G, kPastCache>(out, n, d);
        for (; d < Dp; d += W) write_columns<kCount, 1, kPastCache>(out, n, d);
    }
    template <int kCount>
    void write(A* const* out, int n, bool past_cache) const {
        past_cache ? write<kCount, true>(out, n) : write<kCount, false>(out, n);
    }
};

template <class In>
inline void zero_rows(const BagWork& bag, int64_t begin, int64_t end) {
    if (begin < end)
        memset(static_cast<void*>(static_cast<In*>(bag.grad_f) + begin * bag.D), 0, (end - begin) * bag.D * sizeof(In));
}

template <class In, class A>
void backward_write(BagWork& bag, int64_t end, void* stage) {
    const Scratch<A> scratch{bag};
    const int t = bag.detach_routing ? bag.T : 2;  // the first iteration whose weights the gradient goes through
    const int count = bag.T == 1 ? 0 : bag.detach_routing ? 1 : 2 * (bag.T - 1);
    Pairs<A> pairs{scratch.spare(), scratch.w(t), scratch.e(t), count, bag.m, bag.Dp};
    const bool in_place = __is_same(In, A) && bag.D == bag.Dp;
    const bool past_cache = bag.stream_out && in_place && reinterpret_cast<uintptr_t>(bag.grad_f) % kVectorBytes == 0;
    int64_t row = bag.written == 0 ? 0 : (bag.index ? bag.index[bag.written - 1] : bag.written - 1) + 1;
    while (bag.written < end) {
        In* rows[kBlock];
        A* out[kBlock];
        const int n = static_cast<int>(end - bag.written < kBlock ? end - bag.written : kBlock);
        for (int k = 0; k < n; ++k, ++row) {
            const int64_t real = bag.index ? bag.index[bag.written + k] : bag.written + k;
            zero_rows<In>(bag, row, real);
            row = real;
            rows[k] = static_cast<In*>(bag.grad_f) + row * bag.D;
            out[k] = in_place ? reinterpret_cast<A*>(rows[k]) : static_cast<A*>(stage) + k * bag.Dp;
        }
        pairs.coefficients = scratch.w(t) + bag.written;
        switch (count) {
            case 0:
                pairs.template write<0>(out, n, past_cache);
                break;
            case 2:
                pairs.template write<2>(out, n, past_cache);
                break;
            case 4:
                pairs.template write<4>(out, n, past_cache);
                break;
            default:
                pairs.template write<-1>(out, n, past_cache);
        }
        if (!in_place)
            for (int k = 0; k < n; ++k) narrow_row(out[k], rows[k], bag.D);
        bag.written += n;
    }
    if (end == bag.m) zero_rows<In>(bag, row, bag.rows_in_memory);
}

template <class In, class A, bool kAhead>
void backward_rows(BagWork& bag, int t, int64_t chunk, void* stage, Beside beside) {
    const Scratch<A> scratch{bag};
    const bool with_grad_weights = t == bag.T && bag.grad_weights && !bag.detach_routing;
    A* acc = scratch.partial(chunk) + kBlock;
    fill(acc, A(0), bag.Dp);
    const A* vectors[2] = {scratch.S(t - 1), scratch.e(t)};
    const A lse = scratch.lse(t);
    const A c = static_cast<A>(bag.sigma_dot_e + (with_grad_weights ? bag.weights_dot : 0));
    const int64_t end = chunk_end(bag, chunk);
    for (int64_t r = chunk_begin(bag, chunk); r < end; r += kBlock) {
        const Block<In, A> block(bag, r, end, static_cast<A*>(stage));
        PerRow<A> dots[2];
        block_dots<2, kAhead>(block.rows, vectors, dots, bag.Dp, bag.ahead);
        const PerRow<A> w = dots[0].first(block.n, -kInfinity<A>).exp_minus(lse);
        A beta[kBlock];
        if (with_grad_weights) {
            dots[1].to(beta);
            for (int k = 0; k < block.n; ++k) beta[k] += grad_weight<A>(bag, r + k);
            dots[1] = PerRow<A>::from(beta);
        }
        for (int k = 0; k < w.kVectors; ++k) dots[1].v[k] = w.v[k] * (dots[1].v[k] - c);
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
        if (beside.bag) {
            const int64_t to = beside.bag->written + beside.blocks * kBlock;
            if (beside.bag->written < beside.bag->m)
                backward_write<In, A>(*beside.bag, to < beside.bag->m ? to : beside.bag->m, stage);
        }
    }
}

template <class In, class A>
void backward_chunk(BagWork& bag, int t, int64_t chunk, void* stage, Beside beside) {
    bag.ahead ? backward_rows<In, A, true>(bag, t, chunk, stage, beside)
              : backward_rows<In, A, false>(bag, t, chunk, stage, beside);
}

template <class A>
void backward_merge(BagWork& bag, int t) {
    const Scratch<A> scratch{bag};
    bag.copied = bag.copy;
    A* sum = scratch.sum();
    for (int64_t k = 0; k < bag.chunks; ++k) {
        const A* acc = scratch.partial(k) + kBlock;
        for (int64_t d = 0; d < bag.Dp; ++d) sum[d] += acc[d];
    }
    read_vector(static_cast<const A*>(scratch.sigma(t - 1)), scratch.spare(), bag);
    set_e(bag, t - 1, sum);
}

// The part of dL/df that all instances share, e^1 / m, goes to spare.
template <class A>
void backward_end(BagWork& bag) {
    const Scratch<A> scratch{bag};
    A* base = scratch.spare();
    const bool shared = bag.m && (bag.T == 1 || !bag.detach_routing);
    const A scale = shared ? A(1) / static_cast<A>(bag.m) : A(0);
    for (int64_t d = 0; d < bag.Dp; ++d) base[d] = shared ? scale * scratch.e(1)[d] : A(0);
}

template <class In, class A>
const AdjustPoolKernels& kernels() {
    static const AdjustPoolKernels table = {
        forward_chunk<In, A>,
        forward_merge<In, A>,
        weights_chunk<A>,
        backward_begin<In, A>,
        backward_weights_chunk<In, A>,
        backward_weights_merge<A>,
        backward_chunk<In, A>,
        backward_merge<A>,
        backward_end<A>,
        backward_write<In, A>,
    };
    return table;
}

}  // namespace

namespace AMIL_ISA {

const AdjustPoolKernels& adjust_pool_kernels(Dtype dtype) {
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
