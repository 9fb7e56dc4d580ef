// The refinement step of DARK and UDP on the CPU: Gaussian blur around the peak, and of the whole map where the clamp
// requires it (see ../decode_joint.h).
//
// Included by decode_maps.cpp only, which is compiled once per instruction set: everything is in an unnamed namespace
// and no templates of the standard library are used (see runtime/vector.h).
#pragma once

#include "decode_heatmaps/simd/find_peak.h"

namespace amil {
namespace {

constexpr int kMaxReach = 2;  // of the stencil, in pixels
constexpr int kPatchWidth = 8;

// The blurred pixels at offsets (dy, dx) of at most kMaxReach from the peak.
template <class T>
struct BlurredPatch {
    T values[2 * kMaxReach + 1][kPatchWidth];
    int reach;
    T at(int dy, int dx) const { return values[dy + reach][dx + reach]; }
};

// Scratch elements for the window around the peak and its vertically blurred rows.
inline int64_t window_elements(int radius) {
    const int rows = 2 * kMaxReach + 1 + 2 * radius;
    return static_cast<int64_t>(rows) * padded(rows) + (2 * kMaxReach + 1) * (padded(rows) + kPatchWidth);
}

// Blurs the pixels around the peak at (x, y). kRadius: the blur's radius if known at compile time, otherwise 0.
template <int kRadius, class T>
void blur_around(const MapRows<T>& map, int H, int W, int x, int y, int reach, const T* weights, int radius, T* scratch,
                 BlurredPatch<T>& patch) {
    const int R = kRadius ? kRadius : radius;
    const int rows = 2 * reach + 1, window = rows + 2 * R;  // the window is square
    const int columns = kRadius ? padded(2 * kMaxReach + 1 + 2 * kRadius) : padded(window);
    const int x0 = x - reach - R, y0 = y - reach - R;
    const T* source = scratch;
    int64_t source_stride = columns;
    if (x0 >= 0 && y0 >= 0 && x0 + columns <= W && y0 + window <= H) {
        source = map.data + y0 * map.stride + x0;
        source_stride = map.stride;
    } else {  // the map is zero-padded
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
    const int blurred_stride = columns + kPatchWidth;
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
        for (int j = 0; j < kPatchWidth; ++j) out[columns + j] = 0;
    }
    patch.reach = reach;
    for (int r = 0; r < rows; ++r) {
        T sums[kPatchWidth] = {};
        for (int t = 0; t <= 2 * R; ++t)
            for (int j = 0; j < kPatchWidth; ++j) sums[j] += weights[t] * blurred[r * blurred_stride + t + j];
        for (int j = 0; j < kPatchWidth; ++j) patch.values[r][j] = sums[j];
    }
}

// sums[j] = weights[0] in[j] + weights[1] in[stride + j] + ... for the lanes j of kVectors vectors.
template <int kVectors, class T>
inline void weighted_sums(const T* in, int64_t stride, const T* weights, int taps, Vec<T>* sums) {
    for (int v = 0; v < kVectors; ++v) sums[v] = Vec<T>{};
    for (int t = 0; t < taps; ++t)
        for (int v = 0; v < kVectors; ++v) sums[v] += weights[t] * load(in + t * stride + v * kWidth<T>);
}

// The maximum of the whole blurred map. `row` is scratch of W + 2 radius + 2 kLanes elements.
template <class T>
T blurred_maximum(const MapRows<T>& map, int H, int W, const T* weights, int radius, T* row) {
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
            weighted_sums<kVectors>(in + x, map.stride, w, end - first, sums);
            for (int v = 0; v < kVectors; ++v) store(inside + x + v * kStep, sums[v]);
        }
        for (; x + kStep <= W; x += kStep) {
            weighted_sums<1>(in + x, map.stride, w, end - first, sums);
            store(inside + x, sums[0]);
        }
        for (; x < W; ++x) {
            inside[x] = 0;
            for (int t = 0; t < end - first; ++t) inside[x] += w[t] * in[t * map.stride + x];
        }
        for (x = 0; x + kVectors * kStep <= W; x += kVectors * kStep) {
            weighted_sums<kVectors>(row + x, 1, weights, taps, sums);
            for (int v = 0; v < kVectors; ++v) best = sums[v] > best ? sums[v] : best;
        }
        for (; x + kStep <= W; x += kStep) {
            weighted_sums<1>(row + x, 1, weights, taps, sums);
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
Step<T> blur_step(const DecodeCall& call, const MapRows<T>& map, const Peak<T>& peak, const T* weights, int radius,
                  T* scratch) {
    const Refine refine = call.refine;
    const int H = call.H, W = call.W, x = peak.x, y = peak.y;
    BlurredPatch<T> patch;
    const int reach = stencil_reach(refine);
    if (radius == 5)  // the common kernel sizes, 11 and 17, have unrolled loops
        blur_around<5>(map, H, W, x, y, reach, weights, radius, scratch, patch);
    else if (radius == 8)
        blur_around<8>(map, H, W, x, y, reach, weights, radius, scratch, patch);
    else
        blur_around<0>(map, H, W, x, y, reach, weights, radius, scratch, patch);

    T values[kLanes];  // kStencil rounded up to whole vectors
    bool may_change = false;
    const int n = stencil_size(refine);
    for (int i = 0; i < n; ++i) {
        values[i] = patch.at(stencil_y(refine, i, y, H), stencil_x(refine, i, x, W));
        may_change |= clamp_may_change(refine, values[i], peak.value);
    }
    for (int i = n; i < kLanes; ++i) values[i] = values[0];
    const T factor = may_change ? peak.value / blurred_maximum(map, H, W, weights, radius, scratch) : T(1);
    for (int i = 0; i < kLanes; ++i) values[i] = rescale_and_clamp(refine, values[i], factor);
    const int exponent = exponent_of(values[0]);
    T logs[kLanes];
    for (int i = 0; i < kLanes; ++i) logs[i] = log_minus_exponent(values[i], exponent);
    return newton_step(refine, logs);
}

}  // namespace
}  // namespace amil
