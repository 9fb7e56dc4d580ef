// Builds csrc/decode_heatmaps/decode_heatmaps.cu as a CPU library for ctypes.
#include "decode_heatmaps/decode_heatmaps.cu"

#include <string>

namespace amil {
namespace {

alignas(16) unsigned char shared_memory[49152];
BlurWeights weights;

template <class T>
T* pointer(int64_t address) {
    return reinterpret_cast<T*>(address);
}

}  // namespace

BlurWeights blur_weights(int) { return weights; }

}  // namespace amil

inline unsigned char* shared_memory_on_cpu() { return amil::shared_memory; }
inline size_t shared_memory_on_cpu_size() { return sizeof amil::shared_memory; }

// `a` holds the 25 members of DecodeCall in their order, `half_weights` the weights of the blur from the center
// outward. Returns the error message, or "" on success.
extern "C" __attribute__((visibility("default"))) const char* decode_heatmaps(const int64_t* a,
                                                                              const double* half_weights) {
    static std::string error;
    error.clear();
    amil::DecodeCall call{};
    call.heatmaps = amil::pointer<const void>(a[0]);
    call.stride_b = a[1], call.stride_k = a[2], call.stride_y = a[3], call.stride_x = a[4];
    call.flipped = amil::pointer<const void>(a[5]);
    call.flipped_stride_b = a[6], call.flipped_stride_k = a[7], call.flipped_stride_y = a[8];
    call.flipped_stride_x = a[9];
    call.swap = amil::pointer<const int64_t>(a[10]);
    call.shift_flipped = a[11] != 0;
    call.dtype = static_cast<amil::Dtype>(a[12]);
    call.B = a[13], call.K = a[14], call.H = static_cast<int>(a[15]), call.W = static_cast<int>(a[16]);
    call.refine = static_cast<amil::Refine>(a[17]);
    call.convention = static_cast<amil::Convention>(a[18]);
    call.blur_kernel = static_cast<int>(a[19]);
    call.center = amil::pointer<const float>(a[20]);
    call.scale = amil::pointer<const float>(a[21]);
    call.affine = amil::pointer<const float>(a[22]);
    call.coords = amil::pointer<float>(a[23]);
    call.scores = amil::pointer<float>(a[24]);
    amil::weights.radius = call.blur_kernel / 2;
    for (int d = 0; d <= amil::weights.radius; ++d) amil::weights.weights[d] = half_weights[d];
    try {
        amil::decode_heatmaps_cuda(call, 1, nullptr);
    } catch (const std::exception& exception) {
        error = exception.what();
    }
    return error.c_str();
}
