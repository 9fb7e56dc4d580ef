// Heatmap decoding on the CPU: the weights of the Gaussian blur and the distribution of maps over threads.
#include "decode_heatmaps/decode_heatmaps.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "build_info.h"
#include "runtime/instruction_set.h"
#include "runtime/parallel.h"

namespace amil {
namespace {

// Elements per task: for less work than this, waking a second thread costs more than it saves.
constexpr int64_t kTaskElements = 32 << 10;

// Scratch up to this size stays allocated in each thread between calls.
constexpr size_t kMaxCachedScratchBytes = 1 << 20;

DecodeFunctions decode_functions() {
    switch (instruction_set()) {
#if AMIL_WITH_X86_SIMD
        case InstructionSet::avx512:
            return avx512::decode_functions();
        case InstructionSet::avx2:
            return avx2::decode_functions();
#endif
        default:
            return baseline::decode_functions();
    }
}

}  // namespace

BlurWeights blur_weights(int blur_kernel) {
    BlurWeights blur{};
    blur.radius = blur_kernel / 2;
    // OpenCV's small kernels are tabulated with few significant bits.
    static constexpr double kSmall[][5] = {{1},
                                           {2 / 4., 1 / 4.},
                                           {6 / 16., 4 / 16., 1 / 16.},
                                           {18 / 64., 14 / 64., 7 / 64., 2 / 64.},
                                           {60 / 256., 51 / 256., 30 / 256., 13 / 256., 4 / 256.}};
    if (blur.radius <= 4) {
        std::copy(kSmall[blur.radius], kSmall[blur.radius] + blur.radius + 1, blur.weights);
        return blur;
    }
    const double sigma = 0.3 * (blur.radius - 1) + 0.8;
    double sum = 0;
    for (int d = blur.radius; d >= 0; --d) {
        blur.weights[d] = std::exp(-0.5 * d * d / (sigma * sigma));
        sum += (d ? 2 : 1) * blur.weights[d];
    }
    for (int d = 0; d <= blur.radius; ++d) blur.weights[d] /= sum;
    return blur;
}

void decode_heatmaps_cpu(const DecodeCall& call, int num_threads) {
    const BlurWeights blur = blur_weights(call.blur_kernel);
    const DecodeFunctions functions = decode_functions();
    const size_t scratch_bytes = static_cast<size_t>(functions.scratch_bytes(call));
    const int64_t num_maps = call.B * call.K, elements = static_cast<int64_t>(call.H) * call.W;
    const int64_t maps_per_task = std::max<int64_t>(1, kTaskElements / elements);
    const int64_t num_tasks = (num_maps + maps_per_task - 1) / maps_per_task;
    parallel_for(num_tasks, num_threads, [&](int64_t task) {
        thread_local std::vector<char> cached;
        std::vector<char> large;
        std::vector<char>& scratch = scratch_bytes <= kMaxCachedScratchBytes ? cached : large;
        if (scratch.size() < scratch_bytes) scratch.resize(scratch_bytes);
        const int64_t begin = task * maps_per_task;
        functions.decode_maps(call, blur, begin, std::min(num_maps, begin + maps_per_task), scratch.data());
    });
}

}  // namespace amil
