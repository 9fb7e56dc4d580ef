// Heatmap decoding on the CPU, map by map. Compiled once per instruction set, without fused multiply-adds (setup.py):
// all copies return the same bits. T is the accumulation type, In the type of the maps.
//
// A map of type T with unit stride along x is read where it lies; any other (16-bit, strided, averaged with its mirror
// image) is first written to the thread's scratch as T, a band of rows at a time, and each band is searched while
// it is in the L1 cache. Memory is read once either way.
#include <stdint.h>
#if defined(__SSE2__)
#include <emmintrin.h>
#endif

#include "decode_heatmaps/decode_heatmaps.h"
#include "runtime/vector.h"
// needs vector.h's widen()
#include "decode_heatmaps/decode_joint.h"

namespace amil {
namespace {

constexpr int kBandElements = 1024;  // the piece of a map that is searched for its maximum at a time
constexpr int kLanes = 16;           // columns of the window are padded to a multiple of this

inline int padded(int n) { return (n + kLanes - 1) / kLanes * kLanes; }
inline int min(int a, int b) { return a < b ? a : b; }
inline int max(int a, int b) { return a > b ? a : b; }

// ---- rows of a map ----

template <class T>
struct Map {
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
    if (!map.mirror) return;
    const In* mirror = map.mirror + y * map.mirror_stride_y;
    int x = 0;
    if (map.shift) {
        out[0] = map.at(y, 0);
        x = 1;
    }
    const In* last =
        mirror + map.mirror_column(x) * map.mirror_stride_x;  // falls on column x, the one before it on x + 1
    if (map.mirror_stride_x == 1)
        for (int i = 0; i < W - x; ++i) out[x + i] = MapView<In>::average(out[x + i], widen(last[-i]));
    else
        for (int i = 0; i < W - x; ++i)
            out[x + i] = MapView<In>::average(out[x + i], widen(last[-i * map.mirror_stride_x]));
}

// ---- the maximum ----

// Bit i: lanes i are equal.
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

// The running maximum over bands of a map, lane by lane, with the first band in which each lane reached its own; and a
// sum of everything seen, which a NaN makes NaN (so may infinities). One reduction over lanes per map is enough.
template <class T>
struct Search {
    static constexpr int kStep = kWidth<T>, kChains = 4;
    typedef typename VectorOf<T>::integers Integers;
    Vec<T> best, sum = {};
    Integers best_band = {};

    // Adds x[0 .. n - 1], n >= 1, as the next band.
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
        if (n > kStep && n % kStep) add(top[0], sums[0], load(x + n - kStep));  // some elements twice
        const Integers greater = band == 0 ? Integers{} - 1 : top[0] > best;
        best = greater ? top[0] : best;
        best_band = greater ? Integers{} + band : best_band;
        sum += sums[0];
    }
    static void add(Vec<T>& top, Vec<T>& sum, Vec<T> v) {
        top = v > top ? v : top;
        sum += v;
    }

    // The maximum, and the first band that has it.
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
    bool may_have_seen_nan() const {
        const T total = sum_lanes<T>(sum);
        return total != total;
    }
};

// The first i with x[i] == value; there is one.
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

// Copies the map to `copy` unless it is used in place; sets `map` to where it is. A NaN in the map makes value NaN.
template <class In, class T>
Peak<T> find_peak(const MapView<In>& view, bool in_place, int H, int W, T* copy, Map<T>& map) {
    map = in_place ? Map<T>{reinterpret_cast<const T*>(view.map), view.stride_y} : Map<T>{copy, W};
    const bool joined = map.stride == W;  // rows without gaps are searched as one
    const int band_rows = joined ? max(1, kBandElements / W) : 1;
    Search<T> search;
    for (int y = 0, band = 0; y < H; y += band_rows, ++band) {
        const int rows = min(band_rows, H - y);
        if (!in_place)
            for (int r = y; r < y + rows; ++r) read_row(view, r, copy + static_cast<int64_t>(r) * W);
        search.add(map.data + y * map.stride, static_cast<int64_t>(rows) * W, band);
    }
    if (search.may_have_seen_nan()) {
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

// ---- the blur ----

// The pixels within kMaxReach of the peak, blurred: at(dy, dx).
constexpr int kMaxReach = 2;
constexpr int kBlockWidth = 8;
template <class T>
struct Block {
    T values[2 * kMaxReach + 1][kBlockWidth];
    int reach;
    T at(int dy, int dx) const { return values[dy + reach][dx + reach]; }
};

// Elements of scratch for the window around the peak and its vertically blurred rows.
inline int64_t window_elements(int radius) {
    const int rows = 2 * kMaxReach + 1 + 2 * radius;
    return static_cast<int64_t>(rows) * padded(rows) + (2 * kMaxReach + 1) * (padded(rows) + kBlockWidth);
}

// kRadius: the blur's radius where it is known when compiling, else 0.
template <int kRadius, class T>
void blur_around(const Map<T>& map, int H, int W, int x, int y, int reach, const T* weights, int radius, T* scratch,
                 Block<T>& block) {
    const int R = kRadius ? kRadius : radius;
    const int rows = 2 * reach + 1, window = rows + 2 * R;  // the window is square
    const int columns = kRadius ? padded(2 * kMaxReach + 1 + 2 * kRadius) : padded(window);
    const int x0 = x - reach - R, y0 = y - reach - R;
    const T* source = scratch;
    int64_t source_stride = columns;
    if (x0 >= 0 && y0 >= 0 && x0 + columns <= W && y0 + window <= H) {
        source = map.data + y0 * map.stride + x0;
        source_stride = map.stride;
    } else {  // zeros surround the map
        for (int i = 0; i < window; ++i) {
            T* to = scratch + i * columns;
            for (int j = 0; j < columns; ++j) to[j] = 0;
            if (y0 + i < 0 || y0 + i >= H) continue;
            const T* from = map.data + (y0 + i) * map.stride;
            const int end = min(window, W - x0);
            for (int j = max(0, -x0); j < end; ++j) to[j] = from[x0 + j];
        }
    }
    T* blurred = scratch + static_cast<int64_t>(window) * columns;
    const int blurred_stride = columns + kBlockWidth;
    for (int r = 0; r < rows; ++r) {
        T* out = blurred + r * blurred_stride;
        for (int j0 = 0; j0 < columns; j0 += kLanes) {
            T sums[kLanes] = {};
            for (int t = 0; t <= 2 * R; ++t) {
                const T* in = source + (r + t) * source_stride + j0;
                for (int j = 0; j < kLanes; ++j) sums[j] += weights[t] * in[j];
            }
            for (int j = 0; j < kLanes; ++j) out[j0 + j] = sums[j];
        }
        for (int j = 0; j < kBlockWidth; ++j) out[columns + j] = 0;
    }
    block.reach = reach;
    for (int r = 0; r < rows; ++r) {
        T sums[kBlockWidth] = {};
        for (int t = 0; t <= 2 * R; ++t)
            for (int j = 0; j < kBlockWidth; ++j) sums[j] += weights[t] * blurred[r * blurred_stride + t + j];
        for (int j = 0; j < kBlockWidth; ++j) block.values[r][j] = sums[j];
    }
}

// weights[0] in[j] + weights[1] in[stride + j] + ... for the lanes j of kVectors vectors.
template <int kVectors, class T>
inline void weigh(const T* in, int64_t stride, const T* weights, int taps, Vec<T>* sums) {
    for (int v = 0; v < kVectors; ++v) sums[v] = Vec<T>{};
    for (int t = 0; t < taps; ++t)
        for (int v = 0; v < kVectors; ++v) sums[v] += weights[t] * load(in + t * stride + v * kWidth<T>);
}

// The maximum of the whole blurred map. `row` is scratch of W + 2 radius + 2 kLanes elements.
template <class T>
T blurred_maximum(const Map<T>& map, int H, int W, const T* weights, int radius, T* row) {
    constexpr int kStep = kWidth<T>, kVectors = 4;
    const int taps = 2 * radius + 1;
    for (int j = 0; j < W + 2 * radius + 2 * kLanes; ++j) row[j] = 0;
    Vec<T> best = Vec<T>{} - static_cast<T>(__builtin_huge_val());
    T tail_best = best[0];
    for (int y = 0; y < H; ++y) {
        const int first = max(0, radius - y), end = min(taps, H + radius - y);
        const T* in = map.data + (y + first - radius) * map.stride;
        const T* w = weights + first;
        T* inside = row + radius;
        Vec<T> sums[kVectors];
        int x = 0;
        for (; x + kVectors * kStep <= W; x += kVectors * kStep) {
            weigh<kVectors>(in + x, map.stride, w, end - first, sums);
            for (int v = 0; v < kVectors; ++v) store(inside + x + v * kStep, sums[v]);
        }
        for (; x + kStep <= W; x += kStep) {
            weigh<1>(in + x, map.stride, w, end - first, sums);
            store(inside + x, sums[0]);
        }
        for (; x < W; ++x) {
            inside[x] = 0;
            for (int t = 0; t < end - first; ++t) inside[x] += w[t] * in[t * map.stride + x];
        }
        for (x = 0; x + kVectors * kStep <= W; x += kVectors * kStep) {
            weigh<kVectors>(row + x, 1, weights, taps, sums);
            for (int v = 0; v < kVectors; ++v) best = sums[v] > best ? sums[v] : best;
        }
        for (; x + kStep <= W; x += kStep) {
            weigh<1>(row + x, 1, weights, taps, sums);
            best = sums[0] > best ? sums[0] : best;
        }
        for (; x < W; ++x) {
            T sum = 0;
            for (int t = 0; t < taps; ++t) sum += weights[t] * row[x + t];
            tail_best = sum > tail_best ? sum : tail_best;
        }
    }
    for (int lane = 0; lane < kStep; ++lane) tail_best = best[lane] > tail_best ? best[lane] : tail_best;
    return tail_best;
}

template <class T>
Step<T> blur_step(const DecodeCall& call, const Map<T>& map, const Peak<T>& peak, const T* weights, int radius,
                  T* scratch) {
    const Refine refine = call.refine;
    const int H = call.H, W = call.W, x = peak.x, y = peak.y;
    Block<T> block;
    const int reach = stencil_reach(refine);
    if (radius == 5)  // the usual kernels, 11 and 17: their loops are unrolled
        blur_around<5>(map, H, W, x, y, reach, weights, radius, scratch, block);
    else if (radius == 8)
        blur_around<8>(map, H, W, x, y, reach, weights, radius, scratch, block);
    else
        blur_around<0>(map, H, W, x, y, reach, weights, radius, scratch, block);

    T values[kLanes];  // more than kStencil, to fill whole vectors
    bool touched = false;
    const int n = stencil_size(refine);
    for (int i = 0; i < n; ++i) {
        values[i] = block.at(stencil_y(refine, i, y, H), stencil_x(refine, i, x, W));
        touched |= clamp_may_touch(refine, values[i], peak.value);
    }
    for (int i = n; i < kLanes; ++i) values[i] = values[0];
    const T factor = touched ? peak.value / blurred_maximum(map, H, W, weights, radius, scratch) : T(1);
    for (int i = 0; i < kLanes; ++i) values[i] = rescale_and_clamp(refine, values[i], factor);
    const int exponent = exponent_of(values[0]);
    T logs[kLanes];
    for (int i = 0; i < kLanes; ++i) logs[i] = log_less_exponent(values[i], exponent);
    return newton_step(refine, logs);
}

// ---- maps ----

template <class In>
bool used_in_place(const DecodeCall& call) {
    return __is_same(In, typename AccumulationOf<In>::type) && call.stride_x == 1 && !call.flipped;
}

// Scratch, in elements: a map that can't be used in place, then what the blur needs.
inline int64_t map_elements(const DecodeCall& call) {
    const bool in_place = call.dtype == Dtype::float64 ? used_in_place<double>(call)
                                                       : call.dtype == Dtype::float32 && used_in_place<float>(call);
    return in_place ? 0 : static_cast<int64_t>(call.H) * call.W;
}
inline int64_t blur_elements(const DecodeCall& call) {
    if (call.refine < Refine::dark) return 0;
    const int radius = call.blur_kernel / 2;
    const int64_t window = window_elements(radius), row = call.W + 2 * radius + 2 * kLanes;
    return window > row ? window : row;
}

template <class In>
void decode(const DecodeCall& call, const BlurWeights& blur, int64_t begin, int64_t end, void* scratch) {
    typedef typename AccumulationOf<In>::type T;
    T* copy = static_cast<T*>(scratch);
    T* blur_scratch = copy + map_elements(call);
    const bool in_place = used_in_place<In>(call);
    T weights[2 * kMaxBlurRadius + 1];
    for (int t = 0; t <= 2 * blur.radius; ++t)
        weights[t] = static_cast<T>(blur.weights[t < blur.radius ? blur.radius - t : t - blur.radius]);
    for (int64_t m = begin; m < end; ++m) {
        const int64_t b = m / call.K, k = m % call.K;
        const MapView<In> view(call, b, k, call.flipped ? call.swap[k] : k);
        Map<T> map;
        const Peak<T> peak = find_peak(view, in_place, call.H, call.W, copy, map);
        Step<T> step = {0, 0};
        if (peak.value > 0) {
            if (call.refine == Refine::quarter)
                step = quarter_step<T>(map, call.convention, call.H, call.W, peak.x, peak.y);
            else if (refines_by_blur(call.refine, call.H, call.W, peak.x, peak.y, peak.value))
                step = blur_step(call, map, peak, weights, blur.radius, blur_scratch);
        }
        write_joint(call, b, k, peak.value, peak.x, peak.y, step);
    }
}

void decode_maps(const DecodeCall& call, const BlurWeights& blur, int64_t begin, int64_t end, void* scratch) {
    switch (call.dtype) {
        case Dtype::float64:
            return decode<double>(call, blur, begin, end, scratch);
        case Dtype::float16:
            return decode<Half>(call, blur, begin, end, scratch);
        case Dtype::bfloat16:
            return decode<BFloat16>(call, blur, begin, end, scratch);
        default:
            return decode<float>(call, blur, begin, end, scratch);
    }
}

int64_t scratch_bytes(const DecodeCall& call) {
    const int64_t elements = map_elements(call) + blur_elements(call);
    return elements * (call.dtype == Dtype::float64 ? 8 : 4);
}

}  // namespace

namespace AMIL_ISA {
DecodeFunctions decode_functions() { return {scratch_bytes, decode_maps}; }
}  // namespace AMIL_ISA

}  // namespace amil
