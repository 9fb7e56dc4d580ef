// Vectors of the widest register of this translation unit's instruction set, written with GCC's and clang's vector
// extensions, and conversions between 16-bit floats and float32.
//
// Everything is in an unnamed namespace and no templates of the standard library are used: the linker keeps one copy of
// each inline function with external linkage, and if it kept the one compiled here for AVX-512, code for other
// processors would call it too.
#pragma once

#include <stdint.h>
#include <string.h>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace amil {
namespace {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

template <class A>
struct VectorOf;
template <>
struct VectorOf<float> {
    typedef float type __attribute__((vector_size(kVectorBytes)));
    typedef float unaligned __attribute__((vector_size(kVectorBytes), aligned(4), may_alias));
    typedef int32_t integers __attribute__((vector_size(kVectorBytes)));
};
template <>
struct VectorOf<double> {
    typedef double type __attribute__((vector_size(kVectorBytes)));
    typedef double unaligned __attribute__((vector_size(kVectorBytes), aligned(8), may_alias));
    typedef int64_t integers __attribute__((vector_size(kVectorBytes)));
};
template <class A>
using Vec = typename VectorOf<A>::type;
template <class A>
constexpr int kWidth = kVectorBytes / sizeof(A);

template <class A>
inline Vec<A> load(const A* p) {
    return *reinterpret_cast<const typename VectorOf<A>::unaligned*>(p);
}
template <class A>
inline void store(A* p, Vec<A> v) {
    *reinterpret_cast<typename VectorOf<A>::unaligned*>(p) = v;
}

// Stores to an aligned address without reading the cache line first and without keeping it in the cache.
template <class A>
inline void store_non_temporal(A* p, Vec<A> v) {
#if defined(__AVX512F__)
    _mm512_stream_si512(reinterpret_cast<__m512i*>(p), reinterpret_cast<__m512i>(v));
#elif defined(__AVX2__)
    _mm256_stream_si256(reinterpret_cast<__m256i*>(p), reinterpret_cast<__m256i>(v));
#else
    store(p, v);
#endif
}

template <class A>
inline A sum_lanes(Vec<A> v) {
    A lanes[kWidth<A>];
    store(lanes, v);
    for (int half = kWidth<A> / 2; half; half /= 2)
        for (int k = 0; k < half; ++k) lanes[k] += lanes[k + half];
    return lanes[0];
}

template <class A>
inline bool any_greater(Vec<A> a, Vec<A> b) {
#if defined(__AVX512F__)
    if constexpr (sizeof(A) == 4) return _mm512_cmp_ps_mask(a, b, _CMP_GT_OQ);
#elif defined(__AVX2__)
    if constexpr (sizeof(A) == 4) return _mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_GT_OQ));
#endif
    const auto greater = a > b;
    bool any = false;
    for (int k = 0; k < kWidth<A>; ++k) any |= greater[k] != 0;
    return any;
}

// Sums over the lanes of many vectors at once. A fold takes two vectors a and b whose lanes form groups of 2 H. It adds
// the two halves of each group and returns the sums as groups of H lanes, those of a first. After log2(width) levels,
// the lanes are the complete sums of the vectors, in order.
template <int... I>
struct Indices {};
template <int N, int... I>
struct MakeIndices : MakeIndices<N - 1, N - 1, I...> {};
template <int... I>
struct MakeIndices<0, I...> {
    typedef Indices<I...> type;
};
template <int H, class V, int... I>
inline V fold(V a, V b, Indices<I...>) {
    return __builtin_shufflevector(a, b, (I / H * 2 * H + I % H)...) +
           __builtin_shufflevector(a, b, (I / H * 2 * H + I % H + H)...);
}
// Folds n vectors in place to n / 2, n / 4, ... until one is left or the sums are complete.
template <class A, int N, int H>
inline void fold_all(Vec<A>* v) {
    if constexpr (N > 1 && H > 0) {
        for (int i = 0; i < N / 2; ++i) v[i] = fold<H>(v[2 * i], v[2 * i + 1], typename MakeIndices<kWidth<A>>::type());
        fold_all<A, N / 2, H / 2>(v);
    }
}

// exp(x) for x < 88 with an error of at most 2 units in the last place: 2^n times a polynomial on [-ln 2 / 2, ln 2 / 2]
// (Cephes' expf). Results below the smallest normal number are 0; NaN is propagated.
inline Vec<float> exp_vector(Vec<float> x) {
    const Vec<float> n = (x * 1.44269504088896341f + 12582912.0f) - 12582912.0f;  // rounds to the nearest integer
    const Vec<float> r = (x - n * 0.693359375f) - n * -2.12194440e-4f;
    Vec<float> p = r * 1.9875691500e-4f + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * (r * r) + r + 1.0f;
    typedef VectorOf<float>::integers Integers;
    const Integers exponent = (__builtin_convertvector(n, Integers) + 127) << 23;
    const Vec<float> result = p * reinterpret_cast<Vec<float>>(exponent);
    return x < -87.0f ? Vec<float>{} : result;
}
inline Vec<double> exp_vector(Vec<double> x) {
    for (int k = 0; k < kWidth<double>; ++k) x[k] = __builtin_exp(x[k]);
    return x;
}

// Bit patterns of 16-bit floats.
struct Half {
    uint16_t bits;
};
struct BFloat16 {
    uint16_t bits;
};

inline float bits_to_float(uint32_t bits) {
    float x;
    memcpy(&x, &bits, 4);
    return x;
}
inline uint32_t float_to_bits(float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    return bits;
}

inline float widen(float x) { return x; }
inline double widen(double x) { return x; }
inline float widen(BFloat16 x) { return bits_to_float(static_cast<uint32_t>(x.bits) << 16); }
inline float widen(Half x) {
    const uint32_t sign = (x.bits & 0x8000u) << 16, magnitude = x.bits & 0x7fffu;
    // A subnormal half is converted as an integer times 2^-24: no step may produce a subnormal float32, which may be
    // flushed to 0. For normal numbers the exponent bias increases by 112; infinity and NaN get the maximum exponent.
    const uint32_t bits = magnitude < 0x0400u   ? float_to_bits(static_cast<float>(magnitude) * 0x1p-24f)
                          : magnitude < 0x7c00u ? (magnitude << 13) + (112u << 23)
                                                : (magnitude << 13) | 0x7f800000u;
    return bits_to_float(bits | sign);
}

inline void narrow(float x, float& out) { out = x; }
inline void narrow(double x, double& out) { out = x; }
inline void narrow(float x, BFloat16& out) {  // round to nearest, ties to even
    const uint32_t bits = float_to_bits(x);
    out.bits = x != x ? 0x7fc0u : static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}
inline void narrow(float x, Half& out) {
    const uint32_t bits = float_to_bits(x), sign = (bits >> 16) & 0x8000u, magnitude = bits & 0x7fffffffu;
    uint32_t half;
    if (magnitude > 0x7f800000u) {
        half = 0x7e00u;
    } else if (magnitude >= 0x477ff000u) {  // rounds to 65536 or more
        half = 0x7c00u;
    } else if (magnitude < 0x38800000u) {  // subnormal: the addition rounds to a multiple of 2^-24
        half = float_to_bits(bits_to_float(magnitude) + 0.5f) - 0x3f000000u;
    } else {
        half = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
    }
    out.bits = static_cast<uint16_t>(half | sign);
}

template <class In, class A>
inline void widen_row(const In* row, A* out, int64_t D) {
    int64_t d = 0;
#if defined(__AVX512F__)
    if constexpr (sizeof(In) == 2) {
        for (; d + 16 <= D; d += 16) {
            const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(row + d));
            if constexpr (__is_same(In, Half))
                _mm512_storeu_ps(out + d, _mm512_cvtph_ps(bits));
            else
                _mm512_storeu_si512(out + d, _mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
        }
    }
#elif defined(__AVX2__)
    if constexpr (sizeof(In) == 2) {
        for (; d + 8 <= D; d += 8) {
            const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(row + d));
            if constexpr (__is_same(In, Half))
                _mm256_storeu_ps(out + d, _mm256_cvtph_ps(bits));
            else
                _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + d),
                                    _mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
        }
    }
#endif
    for (; d < D; ++d) out[d] = widen(row[d]);
}

template <class In, class A>
inline void narrow_row(const A* row, In* out, int64_t D) {
    int64_t d = 0;
#if defined(__AVX2__)
    if constexpr (__is_same(In, Half)) {
        for (; d + 8 <= D; d += 8)
            _mm_storeu_si128(reinterpret_cast<__m128i*>(out + d), _mm256_cvtps_ph(_mm256_loadu_ps(row + d), 0));
    }
#endif
    for (; d < D; ++d) narrow(row[d], out[d]);
}

}  // namespace
}  // namespace amil
