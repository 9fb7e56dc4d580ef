// Heatmap decoding: the arguments of a call and its implementations on the CPU and on CUDA. The computation for one
// joint is in decode_joint.h.
#pragma once

#include <stdint.h>

#include "runtime/dtype.h"

namespace amil {

enum class Refine { none = 0, quarter = 1, dark = 2, dark_udp = 3 };
enum class Convention { hrnet = 0, darkpose = 1, mmpose = 2 };

// All strides count elements. "acc" is float64 for float64 maps and float32 for all others.
struct DecodeCall {
    const void* heatmaps;  // (B, K, H, W), dtype
    int64_t stride_b, stride_k, stride_y, stride_x;
    const void* flipped;  // (B, K, H, W), dtype: the maps of the flipped crop; nullptr: none
    int64_t flipped_stride_b, flipped_stride_k, flipped_stride_y, flipped_stride_x;
    const int64_t* swap;  // (K,) in host memory: joint k is averaged with joint swap[k] of `flipped`
    bool shift_flipped;   // shift the flipped-back maps by one pixel to the right
    Dtype dtype;
    int64_t B, K;
    int H, W;  // at least 1, at most 2^30 pixels: sums with the halo of the blur fit an int
    Refine refine;
    Convention convention;
    int blur_kernel;      // odd, 1 .. 2 * kMaxBlurRadius + 1
    const float* center;  // (B, 2) contiguous, image pixels; nullptr: none
    const float* scale;   // (B, 2) contiguous, box size / 200; set if center is
    const float* affine;  // (B, 2, 3) contiguous, heatmap to image pixels; nullptr: none
    float* coords;        // (B, K, 2) contiguous: x, y
    float* scores;        // (B, K) contiguous
};

constexpr int kMaxBlurRadius = 127;

// weights[d]: the weight of the Gaussian blur at distance d from the center, d = 0 .. radius. The 2 radius + 1 taps sum
// to 1.
struct BlurWeights {
    int radius;
    double weights[kMaxBlurRadius + 1];
};

// The Gaussian that OpenCV uses for this kernel size if no standard deviation is given, as in the original
// implementations of DARK and UDP.
BlurWeights blur_weights(int blur_kernel);

// Decodes heatmaps in host memory.
void decode_heatmaps_cpu(const DecodeCall& call, int num_threads);

// Decodes heatmaps on a CUDA device; all tensors but `swap` are in device memory. Enqueues one kernel (with `flipped`,
// one per 512 joints) on the stream and returns without synchronizing. `device`, the current device of the caller, is
// also left current. Throws std::runtime_error if a launch fails.
// Only in builds with CUDA.
void decode_heatmaps_cuda(const DecodeCall& call, int device, void* stream);

// One copy per instruction set, from csrc/decode_heatmaps/simd/decode_maps.cpp.
struct DecodeFunctions {
    int64_t (*scratch_bytes)(const DecodeCall& call);
    // Decodes maps begin .. end - 1 of the B * K maps. `scratch` has scratch_bytes(call) bytes, owned by the calling
    // thread.
    void (*decode_maps)(const DecodeCall& call, const BlurWeights& blur, int64_t begin, int64_t end, void* scratch);
};
namespace baseline {
DecodeFunctions decode_functions();
}
namespace avx2 {
DecodeFunctions decode_functions();
}
namespace avx512 {
DecodeFunctions decode_functions();
}

}  // namespace amil
