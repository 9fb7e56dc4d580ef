// Heatmap decoding on the CPU. Compiled once per instruction set, without fused multiply-adds (setup.py), so that all
// copies return the same bits.
#include "decode_heatmaps/decode_heatmaps.h"
#include "decode_heatmaps/simd/blur_step.h"
#include "decode_heatmaps/simd/find_peak.h"

namespace amil {
namespace {

template <class In>
bool used_in_place(const DecodeCall& call) {
    return __is_same(In, typename AccumulationOf<In>::type) && call.stride_x == 1 && !call.flipped;
}

// Scratch in elements: the converted map, if the map is not used in place, followed by the blur's buffers.
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
        MapRows<T> map;
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
