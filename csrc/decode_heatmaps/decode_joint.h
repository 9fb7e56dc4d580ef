// The arithmetic of heatmap decoding for one joint, shared by the CPU (csrc/decode_heatmaps/simd/decode_maps.cpp) and
// CUDA (csrc/decode_heatmaps/decode_heatmaps.cu). Both compile it without fused multiply-adds, so both get the same
// bits.
//
// The including file must define `widen(In)`, the conversion of a map element to acc, before it includes this header.
// Everything is in an unnamed namespace: simd/ is compiled once per instruction set, and the linker must not merge the
// copies.
//
// DARK and UDP take a Newton step on the logarithm L of the Gaussian-blurred map B at its maximum. The original
// implementations blur the whole map, rescale it to the maximum of the input, R = B max(h) / max(B), clamp R to
// [low, high] and take the logarithm. The step depends only on differences of a few L around the peak. Since log R =
// log B + constant, the scale cancels unless the clamp changes one of these few values. It does not if they are all
// >= low and max(h) <= high, because max(B) <= max(h) (the weights sum to 1 and the map is zero-padded) and therefore
// B <= R <= max(h). In all other cases max(B) is needed, and with it the whole blurred map.
#pragma once

#include <stdint.h>
#include <string.h>

#include "decode_heatmaps/decode_heatmaps.h"

#ifdef __CUDACC__
#define AMIL_HD __host__ __device__ __forceinline__
#else
#define AMIL_HD inline
#endif

namespace amil {
namespace {

// ---- reading maps ----

template <class In>
struct AccumulationOf {
    typedef float type;
};
template <>
struct AccumulationOf<double> {
    typedef double type;
};

// One joint's map, averaged with the map of the flipped crop if there is one.
template <class In>
struct MapView {
    typedef typename AccumulationOf<In>::type T;
    const In* map;
    int64_t stride_y, stride_x;
    const In* flipped;  // nullptr: none
    int64_t flipped_stride_y, flipped_stride_x;
    int W;
    bool shift_flipped;

    AMIL_HD MapView(const DecodeCall& call, int64_t b, int64_t k, int64_t flipped_k) {
        map = static_cast<const In*>(call.heatmaps) + b * call.stride_b + k * call.stride_k;
        stride_y = call.stride_y, stride_x = call.stride_x;
        flipped = nullptr;
        if (call.flipped)
            flipped =
                static_cast<const In*>(call.flipped) + b * call.flipped_stride_b + flipped_k * call.flipped_stride_k;
        flipped_stride_y = call.flipped_stride_y, flipped_stride_x = call.flipped_stride_x;
        W = call.W, shift_flipped = call.shift_flipped;
    }

    // The column of the flipped map that corresponds to column x. The shift does not affect column 0, as in HRNet.
    AMIL_HD int flipped_column(int x) const { return W - 1 - x + (shift_flipped && x > 0); }

    AMIL_HD T at(int y, int x) const {
        const T value = widen(map[y * stride_y + x * stride_x]);
        if (!flipped) return value;
        return average(value, widen(flipped[y * flipped_stride_y + flipped_column(x) * flipped_stride_x]));
    }

    static AMIL_HD T average(T a, T b) { return (a + b) * T(0.5); }
};

// Orders candidates for the maximum: the greater value wins, and among equal values the smaller flat index.
template <class T>
AMIL_HD bool beats(T value, int64_t index, T other_value, int64_t other_index) {
    return value > other_value || (value == other_value && index < other_index);
}

// ---- refinement ----

template <class T>
struct Step {
    T x, y;
};

template <class T>
AMIL_HD T quarter_sign(T difference) {  // +-1/4; 0 for 0 and NaN
    return T(0.25) * T((difference > 0) - (difference < 0));
}

// A quarter of a pixel toward the greater neighbor along each axis. `map.at(y, x)` returns a pixel as T.
template <class T, class Map>
AMIL_HD Step<T> quarter_step(const Map& map, Convention convention, int H, int W, int x, int y) {
    const bool inner_x = 1 < x && x < W - 1, inner_y = 1 < y && y < H - 1;
    const bool per_axis = convention == Convention::mmpose;  // border checked per axis, not for both at once
    const bool along_x = inner_x && (per_axis ? 0 < y : inner_y), along_y = inner_y && (per_axis ? 0 < x : inner_x);
    Step<T> step = {0, 0};
    if (along_x) step.x = quarter_sign<T>(map.at(y, x + 1) - map.at(y, x - 1));
    if (along_y) step.y = quarter_sign<T>(map.at(y + 1, x) - map.at(y - 1, x));
    return step;
}

// True if the mode is DARK or UDP and refines a maximum at (x, y); an infinite maximum is never refined.
template <class T>
AMIL_HD bool refines_by_blur(Refine refine, int H, int W, int x, int y, T maximum) {
    if (!(maximum - maximum == 0)) return false;
    if (refine == Refine::dark) return 1 < x && x < W - 2 && 1 < y && y < H - 2;
    return refine == Refine::dark_udp;
}

// The stencil: pixels around the peak whose logarithms are used. UDP uses the first 7, DARK all 13.
constexpr int kStencil = 13;
AMIL_HD int stencil_size(Refine refine) { return refine == Refine::dark ? 13 : 7; }
AMIL_HD int stencil_reach(Refine refine) { return refine == Refine::dark ? 2 : 1; }
AMIL_HD int stencil_dx(int i) {
    constexpr signed char dx[kStencil] = {0, 1, -1, 0, 0, 1, -1, -1, 1, 2, -2, 0, 0};
    return dx[i];
}
AMIL_HD int stencil_dy(int i) {
    constexpr signed char dy[kStencil] = {0, 0, 0, 1, -1, 1, -1, 1, -1, 0, 0, 2, -2};
    return dy[i];
}
// Offset of stencil point i from a peak at (x, y). UDP replicates the border pixels outside the map.
AMIL_HD int clamp_to_edge(int offset, int position, int size) {
    return position + offset < 0 ? -position : position + offset >= size ? size - 1 - position : offset;
}
AMIL_HD int stencil_x(Refine refine, int i, int x, int W) {
    return refine == Refine::dark ? stencil_dx(i) : clamp_to_edge(stencil_dx(i), x, W);
}
AMIL_HD int stencil_y(Refine refine, int i, int y, int H) {
    return refine == Refine::dark ? stencil_dy(i) : clamp_to_edge(stencil_dy(i), y, H);
}

template <class T>
AMIL_HD T clamp_low(Refine refine) {
    return refine == Refine::dark ? T(1e-10) : T(1e-3);
}
template <class T>
AMIL_HD T clamp_high(Refine refine) {  // DARK has no upper limit
    return refine == Refine::dark ? T(sizeof(T) == 8 ? 1e308 : 3e38) : T(50);
}
// True if the clamp may change this value of the blurred map, given the map's maximum (see the top of the file).
template <class T>
AMIL_HD bool clamp_may_change(Refine refine, T blurred, T maximum) {
    return !(blurred >= clamp_low<T>(refine) && maximum <= clamp_high<T>(refine));
}
template <class T>
AMIL_HD T rescale_and_clamp(Refine refine, T blurred, T factor) {
    const T low = clamp_low<T>(refine), high = clamp_high<T>(refine), value = blurred * factor;
    return value > low ? (value < high ? value : high) : low;  // NaN becomes low
}

// log(v) - exponent * log(2) for normal v > 0, implemented here so that all compilers produce the same bits. With v =
// 2^e m, sqrt(1/2) <= m < sqrt(2), and s = (m - 1) / (m + 1): log m = 2 (s + s^3 / 3 + s^5 / 5 + ...), truncated so
// that all digits but the last are exact. Subtracting the peak's exponent first keeps the differences
// accurate for maps with tiny values as well.
AMIL_HD int32_t bits_of(float v) {
    int32_t bits;
    memcpy(&bits, &v, sizeof bits);
    return bits;
}
AMIL_HD int64_t bits_of(double v) {
    int64_t bits;
    memcpy(&bits, &v, sizeof bits);
    return bits;
}
AMIL_HD int exponent_of(float v) { return (bits_of(v) - 0x3f3504f3) >> 23; }  // 0x3f3504f3: sqrt(1/2)
AMIL_HD int exponent_of(double v) { return static_cast<int>((bits_of(v) - 0x3fe6a09e667f3bcd) >> 52); }
AMIL_HD float log_minus_exponent(float v, int exponent) {
    const int e = exponent_of(v);
    const int32_t bits = bits_of(v) - e * (1 << 23);  // e can be negative: no shift
    float m;
    memcpy(&m, &bits, sizeof m);
    const float s = (m - 1.0f) / (m + 1.0f), z = s * s;
    const float series = z * (2.0f / 3 + z * (2.0f / 5 + z * (2.0f / 7 + z * (2.0f / 9))));
    return static_cast<float>(e - exponent) * 0.693147181f + (2.0f * s + s * series);
}
AMIL_HD double log_minus_exponent(double v, int exponent) {
    const int e = exponent_of(v);
    const int64_t bits = bits_of(v) - static_cast<int64_t>(e) * (int64_t{1} << 52);
    double m;
    memcpy(&m, &bits, sizeof m);
    const double s = (m - 1.0) / (m + 1.0), z = s * s;
    double series = 2.0 / 21;
    for (int odd = 19; odd >= 3; odd -= 2) series = series * z + 2.0 / odd;
    return static_cast<double>(e - exponent) * 0.693147180559945309 + (2.0 * s + s * (z * series));
}

// The Newton step -H^-1 g from the logarithms at the stencil points; (0, 0) if H is singular or the step is not finite.
template <class T>
AMIL_HD Step<T> newton_step(Refine refine, const T* L) {
    const T c = L[0], right = L[1], left = L[2], down = L[3], up = L[4], down_right = L[5], up_left = L[6];
    const T dx = T(0.5) * (right - left), dy = T(0.5) * (down - up);
    T dxx, dyy, dxy;
    if (refine == Refine::dark) {
        const T down_left = L[7], up_right = L[8];
        dxx = T(0.25) * (L[9] - 2 * c + L[10]);
        dyy = T(0.25) * (L[11] - 2 * c + L[12]);
        dxy = T(0.25) * (down_right - up_right - down_left + up_left);
    } else {
        const T epsilon = T(1.1920929e-7);  // mmpose adds float32's epsilon to the diagonal
        dxx = (right - 2 * c + left) + epsilon;
        dyy = (down - 2 * c + up) + epsilon;
        dxy = T(0.5) * (down_right - right - down + c + c - left - up + up_left);
    }
    const T determinant = dxx * dyy - dxy * dxy;
    const Step<T> step = {(dxy * dy - dyy * dx) / determinant, (dxy * dx - dxx * dy) / determinant};
    const bool finite = step.x - step.x == 0 && step.y - step.y == 0;
    return determinant != 0 && finite ? step : Step<T>{0, 0};
}

// ---- image coordinates ----

AMIL_HD void to_image(const DecodeCall& call, int64_t b, double& x, double& y) {
    if (call.affine) {
        const float* a = call.affine + 6 * b;
        const double image_x = a[0] * x + a[1] * y + a[2];
        y = a[3] * x + a[4] * y + a[5];
        x = image_x;
    } else if (call.center) {
        const double center_x = call.center[2 * b], center_y = call.center[2 * b + 1];
        const double width = 200.0 * call.scale[2 * b], height = 200.0 * call.scale[2 * b + 1];
        const int W = call.W, H = call.H, W1 = W > 1 ? W - 1 : 1, H1 = H > 1 ? H - 1 : 1;
        if (call.convention == Convention::hrnet) {
            x = (x - 0.5 * W) * (width / W) + center_x;
            y = (y - 0.5 * H) * (width / W) + center_y;
        } else if (call.convention == Convention::darkpose) {
            x = (x - 0.5 * (W - 1)) * ((width - 1) / W1) + center_x;
            y = (y - 0.5 * (H - 1)) * ((width - 1) / W1) + center_y;
        } else {
            const bool udp = call.refine == Refine::dark_udp;
            x = x / (udp ? W1 : W) * width + (center_x - 0.5 * width);
            y = y / (udp ? H1 : H) * height + (center_y - 0.5 * height);
        }
    }
}

// Writes one joint's result: the position (x, y) of its maximum plus `step`, or the convention's invalid marker if the
// maximum is not positive, or NaN if the map contains a NaN.
template <class T>
AMIL_HD void write_joint(const DecodeCall& call, int64_t b, int64_t k, T maximum, int x, int y, Step<T> step) {
    double joint_x = x + static_cast<double>(step.x), joint_y = y + static_cast<double>(step.y);
    if (maximum != maximum)
        joint_x = joint_y = maximum;
    else if (!(maximum > 0))
        joint_x = joint_y = call.convention == Convention::mmpose ? -1 : 0;
    to_image(call, b, joint_x, joint_y);
    float* coords = call.coords + 2 * (b * call.K + k);
    coords[0] = static_cast<float>(joint_x);
    coords[1] = static_cast<float>(joint_y);
    call.scores[b * call.K + k] = static_cast<float>(maximum);
}

}  // namespace
}  // namespace amil
