// The maximum of a heatmap on the CPU. T is the accumulation type, In the type of the maps.
//
// A map of type T with unit stride along x is read in place. Any other map (16-bit, strided, or averaged with the map
// of the flipped crop) is first converted into the thread's scratch, one band of rows at a time, and each band is
// searched while it is in the L1 cache. Either way, the map is read from memory once.
//
// Included by decode_maps.cpp only, which is compiled once per instruction set: everything is in an unnamed namespace
// and no templates of the standard library are used (see runtime/vector.h).
#pragma once

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

#include "decode_heatmaps/decode_heatmaps.h"
#include "runtime/vector.h"
// must follow the definitions of widen() in vector.h
#include "decode_heatmaps/decode_joint.h"

namespace amil {
namespace {

constexpr int kBandElements = 1024;  // pixels that are converted and searched at a time
constexpr int kLanes = 16;           // buffers in scratch are padded to a multiple of this many columns

inline int padded(int n) { return (n + kLanes - 1) / kLanes * kLanes; }
inline int min(int a, int b) { return a < b ? a : b; }
inline int max(int a, int b) { return a > b ? a : b; }

// ---- rows of a map ----

// A map of type T with unit stride along x.
template <class T>
struct MapRows {
    const T* data;
    int64_t stride;
    T at(int y, int x) const { return data[y * stride + x]; }
};

// out[x] = map.at(y, x) for all W columns.
template <class In, class T>
void read_row(const MapView<In>& map, int y, T* out) {
    const In* row = map.map + y * map.stride_y;
    const int W = map.W;
    if (map.stride_x == 1)
        widen_row(row, out, W);
    else
        for (int x = 0; x < W; ++x) out[x] = widen(row[x * map.stride_x]);
    if (!map.flipped) return;
    const In* flipped = map.flipped + y * map.flipped_stride_y;
    int x = 0;
    if (map.shift_flipped) {
        out[0] = map.at(y, 0);
        x = 1;
    }
    // Corresponds to column x; the element before it corresponds to x + 1.
    const In* last = flipped + map.flipped_column(x) * map.flipped_stride_x;
    if (map.flipped_stride_x == 1)
        for (int i = 0; i < W - x; ++i) out[x + i] = MapView<In>::average(out[x + i], widen(last[-i]));
    else
        for (int i = 0; i < W - x; ++i)
            out[x + i] = MapView<In>::average(out[x + i], widen(last[-i * map.flipped_stride_x]));
}

// ---- the maximum ----

// Bit i is set if lanes i are equal.
#if defined(__AVX512F__)
inline unsigned equal_lanes(Vec<float> a, Vec<float> b) { return _mm512_cmp_ps_mask(a, b, _CMP_EQ_OQ); }
inline unsigned equal_lanes(Vec<double> a, Vec<double> b) { return _mm512_cmp_pd_mask(a, b, _CMP_EQ_OQ); }
#elif defined(__AVX2__)
inline unsigned equal_lanes(Vec<float> a, Vec<float> b) { return _mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_EQ_OQ)); }
inline unsigned equal_lanes(Vec<double> a, Vec<double> b) {
    return _mm256_movemask_pd(_mm256_cmp_pd(a, b, _CMP_EQ_OQ));
}
#elif defined(__SSE2__)
inline unsigned equal_lanes(Vec<float> a, Vec<float> b) { return _mm_movemask_ps(_mm_cmpeq_ps(a, b)); }
inline unsigned equal_lanes(Vec<double> a, Vec<double> b) { return _mm_movemask_pd(_mm_cmpeq_pd(a, b)); }
#else
template <class V>
inline unsigned equal_lanes(V a, V b) {
    unsigned bits = 0;
    for (unsigned i = 0; i < sizeof(V) / sizeof(a[0]); ++i) bits |= static_cast<unsigned>(a[i] == b[i]) << i;
    return bits;
}
#endif

// The running maximum over the bands of a map, per lane, with the first band in which each lane reached its maximum;
// and the sum of all elements, which is NaN if one of them is (it may also be NaN if some are infinite). Lanes are
// reduced only once per map.
template <class T>
struct MaximumSearch {
    static constexpr int kStep = kWidth<T>, kChains = 4;
    typedef typename VectorOf<T>::integers Integers;
    Vec<T> best, sum = {};
    Integers best_band = {};

    // Processes x[0 .. n - 1], n >= 1, as the next band.
    void add(const T* x, int64_t n, int band) {
        Vec<T> top[kChains], sums[kChains];
        if (n < kStep) {
            T few[kStep];
            for (int i = 0; i < kStep; ++i) few[i] = x[i < n ? i : 0];
            top[0] = sums[0] = load(few);
        } else if (n < kStep * kChains) {
            top[0] = sums[0] = load(x);
            for (int64_t i = kStep; i + kStep <= n; i += kStep) add(top[0], sums[0], load(x + i));
        } else {
            for (int c = 0; c < kChains; ++c) top[c] = sums[c] = load(x + c * kStep);
            int64_t i = kStep * kChains;
            for (; i + kStep * kChains <= n; i += kStep * kChains)
                for (int c = 0; c < kChains; ++c) add(top[c], sums[c], load(x + i + c * kStep));
            for (; i + kStep <= n; i += kStep) add(top[0], sums[0], load(x + i));
            for (int c = 1; c < kChains; ++c) {
                top[0] = top[c] > top[0] ? top[c] : top[0];
                sums[0] += sums[c];
            }
        }
        if (n > kStep && n % kStep) add(top[0], sums[0], load(x + n - kStep));  // overlaps the elements before
        const Integers greater = band == 0 ? Integers{} - 1 : top[0] > best;
        best = greater ? top[0] : best;
        best_band = greater ? Integers{} + band : best_band;
        sum += sums[0];
    }
    static void add(Vec<T>& top, Vec<T>& sum, Vec<T> v) {
        top = v > top ? v : top;
        sum += v;
    }

    // Returns the maximum and sets `band` to the first band that contains it.
    T result(int& band) const {
        T values[kStep];
        store(values, best);
        for (int half = kStep / 2; half; half /= 2)
            for (int k = 0; k < half; ++k) values[k] = values[k + half] > values[k] ? values[k + half] : values[k];
        band = INT32_MAX;
        for (unsigned lanes = equal_lanes(best, Vec<T>{} + values[0]); lanes; lanes &= lanes - 1) {
            const int lane_band = static_cast<int>(best_band[__builtin_ctz(lanes)]);
            band = lane_band < band ? lane_band : band;
        }
        return values[0];
    }
    bool may_contain_nan() const {
        const T total = sum_lanes<T>(sum);
        return total != total;
    }
};

// The first i with x[i] == value, which must exist.
template <class T>
int64_t find_first(const T* x, int64_t n, T value) {
    const Vec<T> values = Vec<T>{} + value;
    int64_t i = 0;
    for (; i + kWidth<T> <= n; i += kWidth<T>)
        if (const unsigned equal = equal_lanes(load(x + i), values)) return i + __builtin_ctz(equal);
    while (i + 1 < n && x[i] != value) ++i;
    return i;
}

template <class T>
struct Peak {
    T value;
    int x, y;
};

// Finds the maximum; the value is NaN if the map contains a NaN. Unless the map is used in place, it is converted into
// `copy`. `map` is set to the result of the conversion or to the map itself.
template <class In, class T>
Peak<T> find_peak(const MapView<In>& view, bool in_place, int H, int W, T* copy, MapRows<T>& map) {
    map = in_place ? MapRows<T>{reinterpret_cast<const T*>(view.map), view.stride_y} : MapRows<T>{copy, W};
    const bool contiguous = map.stride == W;  // then several rows form one band
    const int band_rows = contiguous ? max(1, kBandElements / W) : 1;
    MaximumSearch<T> search;
    for (int y = 0, band = 0; y < H; y += band_rows, ++band) {
        const int rows = min(band_rows, H - y);
        if (!in_place)
            for (int r = y; r < y + rows; ++r) read_row(view, r, copy + static_cast<int64_t>(r) * W);
        search.add(map.data + y * map.stride, static_cast<int64_t>(rows) * W, band);
    }
    if (search.may_contain_nan()) {
        for (int y = 0; y < H; ++y)
            for (int x = 0; x < W; ++x)
                if (map.at(y, x) != map.at(y, x)) return {map.at(y, x), 0, 0};
    }
    int band;
    Peak<T> peak;
    peak.value = search.result(band);
    const int first_row = band * band_rows, rows = min(band_rows, H - first_row);
    const int64_t i = find_first(map.data + first_row * map.stride, static_cast<int64_t>(rows) * W, peak.value);
    peak.y = first_row + static_cast<int>(i / W);
    peak.x = static_cast<int>(i % W);
    return peak;
}

}  // namespace
}  // namespace amil
