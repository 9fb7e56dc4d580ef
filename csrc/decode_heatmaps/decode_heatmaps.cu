// Heatmap decoding on CUDA: one launch, each map read once.
//
// One group of threads processes one map: a warp for small maps, otherwise a block of 128 or 256 threads. It finds the
// maximum (with 16-byte loads if the map is contiguous and aligned), then computes the few blurred values around it
// from a window of the map that is still cached. The arithmetic is in decode_joint.h, with the same order of operations
// as on the CPU; together with -fmad=false (setup.py) the results are bit-identical.
//
// tests/ops/test_decode_cuda_on_cpu.py runs this file on the CPU: use only the CUDA functions that
// tests/ops/cuda_on_cpu provides, or extend it.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <stdexcept>
#include <string>

#include "decode_heatmaps/decode_heatmaps.h"

namespace amil {
namespace {
__host__ __device__ __forceinline__ float widen(float x) { return x; }
__host__ __device__ __forceinline__ double widen(double x) { return x; }
__host__ __device__ __forceinline__ float widen(__half x) { return __half2float(x); }
__host__ __device__ __forceinline__ float widen(__nv_bfloat16 x) { return __bfloat162float(x); }
}  // namespace
}  // namespace amil
// must follow the definitions of widen()
#include "decode_heatmaps/decode_joint.h"

namespace amil {
namespace {

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;
constexpr int kBlockThreads = 128, kMaxBlockThreads = 256;
constexpr int kLaunchJoints = 512;  // joints per launch with `flipped`: the swap table is passed by value
constexpr int kVectorBytes = 16;

// Kernel arguments of a launch, passed by value (less than 4 KiB): nothing is copied to the device or kept alive, so
// that the launch can be captured in a CUDA graph.
template <class T>
struct DecodeLaunch {
    DecodeCall call;
    int64_t first_joint, num_joints;  // the part of the K joints that this launch processes
    int group;                        // threads per map: kWarp or the whole block
    int buffer;                       // shared-memory elements for the blur of one map; 0 without a blur
    int radius;
    T weights[kMaxBlurRadius + 1];
    int swap[kLaunchJoints];
};

// Shared memory of one group, followed by the blur's buffer.
template <class T>
struct GroupStorage {
    T logs[16];
    T values[kMaxBlockThreads / kWarp];
    int indices[kMaxBlockThreads / kWarp];
    int flags[kMaxBlockThreads / kWarp];
    int needs_maximum;  // of the whole blurred map
    int padding[3];
};

// The threads that process one map.
struct ThreadGroup {
    int size, rank;
    __device__ __forceinline__ void sync() const {
        if (size == kWarp)
            __syncwarp();
        else
            __syncthreads();
    }
};

template <class T>
struct RunningPeak {
    T value;
    int index;
    bool nan;

    // Called with ascending pixel indices, so that the first of equal values is kept.
    __device__ __forceinline__ void update(T v, int i) {
        nan |= v != v;
        if (v > value) value = v, index = i;
    }
};

// Reduces the peaks of all threads; every thread receives the result.
template <class T>
__device__ RunningPeak<T> reduce(const ThreadGroup& group, RunningPeak<T> peak, GroupStorage<T>& shared) {
    for (int distance = kWarp / 2; distance; distance /= 2) {
        const T value = __shfl_xor_sync(kAllLanes, peak.value, distance);
        const int index = __shfl_xor_sync(kAllLanes, peak.index, distance);
        if (beats(value, index, peak.value, peak.index)) peak.value = value, peak.index = index;
    }
    peak.nan = __any_sync(kAllLanes, peak.nan);
    if (group.size == kWarp) return peak;
    const int warp = group.rank / kWarp;
    if (group.rank % kWarp == 0) {
        shared.values[warp] = peak.value;
        shared.indices[warp] = peak.index;
        shared.flags[warp] = peak.nan;
    }
    group.sync();
    for (int w = 0; w < group.size / kWarp; ++w) {
        if (beats(shared.values[w], shared.indices[w], peak.value, peak.index))
            peak.value = shared.values[w], peak.index = shared.indices[w];
        peak.nan |= shared.flags[w] != 0;
    }
    group.sync();
    return peak;
}

__device__ __forceinline__ bool aligned(const void* pointer) {
    return reinterpret_cast<uintptr_t>(pointer) % kVectorBytes == 0;
}

// The elements of one 16-byte load.
template <class In>
struct alignas(kVectorBytes) LoadVector {
    static constexpr int kSize = kVectorBytes / sizeof(In);
    In elements[kSize];
};

// Updates the peak with the pixels of vector v.
template <bool kFlipped, class In, class T>
__device__ __forceinline__ void update_vector(const LoadVector<In>& loaded, const LoadVector<In>& flipped, int v,
                                              RunningPeak<T>& peak) {
    constexpr int V = LoadVector<In>::kSize;
#pragma unroll
    for (int e = 0; e < V; ++e) {
        T value = widen(loaded.elements[e]);
        if (kFlipped) value = MapView<In>::average(value, widen(flipped.elements[V - 1 - e]));
        peak.update(value, v * V + e);
    }
}

// The mirrored position of vector v within its row; a row has `row` vectors.
__device__ __forceinline__ int mirrored(int v, int row) { return v + row - 1 - 2 * (v % row); }

// Updates the peak with the pixels of the map, averaged with the flipped map if there is one, using 16-byte loads, of
// which kInFlight are in flight at a time. A warp reads kInFlight * kWarp consecutive vectors per round, so that the
// addresses of a thread's loads differ by constants, which are encoded in the instructions.
template <bool kFlipped, int kInFlight, class In, class T>
__device__ __forceinline__ void search_vectors(const MapView<In>& map, int count, int row, const ThreadGroup& group,
                                               RunningPeak<T>& peak) {
    const LoadVector<In>* vectors = reinterpret_cast<const LoadVector<In>*>(map.map);
    const LoadVector<In>* flipped = reinterpret_cast<const LoadVector<In>*>(map.flipped);
    const int round = kInFlight * group.size;
    int v = group.rank / kWarp * kInFlight * kWarp + group.rank % kWarp, end = round;
#pragma unroll 1
    for (; end <= count; end += round, v += round) {
        LoadVector<In> loaded[kInFlight], loaded_flipped[kInFlight];
#pragma unroll
        for (int u = 0; u < kInFlight; ++u) {
            loaded[u] = vectors[v + u * kWarp];
            if (kFlipped) loaded_flipped[u] = flipped[mirrored(v + u * kWarp, row)];
        }
#pragma unroll
        for (int u = 0; u < kInFlight; ++u) update_vector<kFlipped>(loaded[u], loaded_flipped[u], v + u * kWarp, peak);
    }
    v = end - round + group.rank;
#pragma unroll 1
    for (; v < count; v += group.size) {
        LoadVector<In> loaded = vectors[v], loaded_flipped;
        if (kFlipped) loaded_flipped = flipped[mirrored(v, row)];
        update_vector<kFlipped>(loaded, loaded_flipped, v, peak);
    }
}

// The maximum over the calling thread's share of the map.
template <bool kFlipped, class In, class T>
__device__ __forceinline__ RunningPeak<T> search(const MapView<In>& map, int H, int W, const ThreadGroup& group) {
    constexpr int V = LoadVector<In>::kSize;
    const int n = H * W;
    RunningPeak<T> peak = {-static_cast<T>(INFINITY), 0, false};
    int p = group.rank;
    if (map.stride_x == 1 && map.stride_y == W && aligned(map.map)) {
        if constexpr (!kFlipped) {
            search_vectors<false, 4>(map, n / V, W, group, peak);
            p += n / V * V;
        } else if (map.flipped_stride_x == 1 && map.flipped_stride_y == W && aligned(map.flipped) && W % V == 0 &&
                   !map.shift_flipped) {
            search_vectors<true, sizeof(T) == 8 ? 1 : 2>(map, n / V, W / V, group, peak);
            p += n;
        }
    }
#pragma unroll 1
    for (; p < n; p += group.size) peak.update(map.at(p / W, p % W), p);
    return peak;
}

// The map blurred along y at (y, x); x may be outside the map.
template <class In, class T>
__device__ T blur_column(const MapView<In>& map, int H, int W, const DecodeLaunch<T>& launch, int y, int x) {
    T sum = 0;
    if (x < 0 || x >= W) return sum;
    const int radius = launch.radius;
#pragma unroll 4
    for (int t = max(0, radius - y); t <= min(2 * radius, H - 1 + radius - y); ++t)
        sum += launch.weights[abs(t - radius)] * map.at(y + t - radius, x);
    return sum;
}

// The blur along x over 2 radius + 1 values of a row.
template <class T>
__device__ T blur_row(const T* row, const DecodeLaunch<T>& launch) {
    const int radius = launch.radius;
    T sum = 0;
#pragma unroll 4
    for (int t = 0; t <= 2 * radius; ++t) sum += launch.weights[abs(t - radius)] * row[t];
    return sum;
}

// The maximum of the whole blurred map, computed tile by tile in the buffer; every thread receives the result.
template <class In, class T>
__device__ T blurred_maximum(const MapView<In>& map, int H, int W, const DecodeLaunch<T>& launch,
                             const ThreadGroup& group, GroupStorage<T>& shared, T* buffer) {
    const int halo = 2 * launch.radius;
    const int tile_width = min(W, launch.buffer - halo), tile_height = launch.buffer / (tile_width + halo);
    RunningPeak<T> best = {-static_cast<T>(INFINITY), 0, false};
#pragma unroll 1
    for (int y0 = 0; y0 < H; y0 += tile_height) {
#pragma unroll 1
        for (int x0 = 0; x0 < W; x0 += tile_width) {
            const int width = min(tile_width, W - x0), columns = width + halo, rows = min(tile_height, H - y0);
#pragma unroll 1
            for (int i = group.rank; i < rows * columns; i += group.size)
                buffer[i] = blur_column(map, H, W, launch, y0 + i / columns, x0 - launch.radius + i % columns);
            group.sync();
#pragma unroll 1
            for (int i = group.rank; i < rows * width; i += group.size) {
                const T value = blur_row(buffer + i / width * columns + i % width, launch);
                if (value > best.value) best.value = value;
            }
            group.sync();
        }
    }
    return reduce(group, best, shared).value;
}

// The Newton step of DARK or UDP; valid in thread 0 of the group.
template <Refine refine, class In, class T>
__device__ Step<T> blur_step(const MapView<In>& map, const DecodeLaunch<T>& launch, const ThreadGroup& group,
                             GroupStorage<T>& shared, T* buffer, T maximum, int x, int y) {
    const int H = launch.call.H, W = launch.call.W;
    const int reach = stencil_reach(refine), rows = 2 * reach + 1, columns = rows + 2 * launch.radius;
    const int n = stencil_size(refine), i = group.rank;
#pragma unroll 1
    for (int j = group.rank; j < rows * columns; j += group.size) {
        const int row = y - reach + j / columns;
        buffer[j] =
            row < 0 || row >= H ? T(0) : blur_column(map, H, W, launch, row, x - reach - launch.radius + j % columns);
    }
    group.sync();
    T value = 0;
    if (i < kWarp) {
        bool may_change = false;
        if (i < n) {
            const int row = reach + stencil_y(refine, i, y, H), column = reach + stencil_x(refine, i, x, W);
            value = blur_row(buffer + row * columns + column, launch);
            may_change = clamp_may_change(refine, value, maximum);
        }
        may_change = __any_sync(kAllLanes, may_change);
        if (i == 0) shared.needs_maximum = may_change;
    }
    group.sync();
    T factor = 1;
    if (shared.needs_maximum) factor = maximum / blurred_maximum(map, H, W, launch, group, shared, buffer);
    Step<T> step = {0, 0};
    if (i < kWarp) {
        if (i < n) shared.logs[i] = rescale_and_clamp(refine, value, factor);
        __syncwarp();
        const int exponent = exponent_of(shared.logs[0]);
        __syncwarp();
        if (i < n) shared.logs[i] = log_minus_exponent(shared.logs[i], exponent);
        __syncwarp();
        if (i == 0) step = newton_step(refine, shared.logs);
    }
    return step;
}

__host__ __device__ constexpr bool uses_blur(Refine refine) { return refine >= Refine::dark; }

// Blocks of kMaxBlockThreads per multiprocessor, as many as possible without spills. There is one kernel per
// refinement, with and without flipped maps. Without a blur and flipped maps, 40 registers suffice for four loads of 16
// bytes in flight, 96 KB per multiprocessor.
template <class In>
constexpr int min_blocks(Refine refine, bool flipped) {
    if (sizeof(In) == 8) return 3;
    if (uses_blur(refine)) return flipped ? 3 : 4;
    return flipped ? 5 : 6;
}

template <Refine refine, bool kFlipped, class In, class T>
__global__ void __launch_bounds__(kMaxBlockThreads, min_blocks<In>(refine, kFlipped))
    decode_kernel(const __grid_constant__ DecodeLaunch<T> launch) {
    extern __shared__ __align__(16) unsigned char shared_memory[];
    const DecodeCall& call = launch.call;
    const ThreadGroup group = {launch.group, static_cast<int>(threadIdx.x) % launch.group};
    const int groups = blockDim.x / launch.group, group_in_block = threadIdx.x / launch.group;
    const int64_t bytes = sizeof(GroupStorage<T>) + launch.buffer * sizeof(T);
    GroupStorage<T>& shared = *reinterpret_cast<GroupStorage<T>*>(shared_memory + group_in_block * bytes);
    T* buffer = reinterpret_cast<T*>(&shared + 1);
    const int64_t m = static_cast<int64_t>(blockIdx.x) * groups + group_in_block;
    if (m >= call.B * launch.num_joints) return;  // past the last map: several warps share the last block
    const int64_t b = m / launch.num_joints, joint = m % launch.num_joints, k = launch.first_joint + joint;
    MapView<In> map(call, b, k, kFlipped ? launch.swap[joint] : 0);
    if (!kFlipped) map.flipped = nullptr;  // as it is, but known to the compiler
    RunningPeak<T> peak = reduce(group, search<kFlipped, In, T>(map, call.H, call.W, group), shared);
    if (peak.nan) peak.value = NAN, peak.index = 0;
    const int x = peak.index % call.W, y = peak.index / call.W;
    Step<T> step = {0, 0};
    if (peak.value > 0) {
        if constexpr (refine == Refine::quarter) {
            step = quarter_step<T>(map, call.convention, call.H, call.W, x, y);
        } else if constexpr (uses_blur(refine)) {
            if (refines_by_blur(refine, call.H, call.W, x, y, peak.value))
                step = blur_step<refine>(map, launch, group, shared, buffer, peak.value, x, y);
        }
    }
    if (group.rank == 0) write_joint(call, b, k, peak.value, x, y, step);
}

void check(cudaError_t status) {
    if (status != cudaSuccess)
        throw std::runtime_error(std::string("decode_heatmaps on CUDA: ") + cudaGetErrorString(status));
}

template <class In, class T, bool kFlipped>
auto kernel_for(Refine refine) {
    switch (refine) {
        case Refine::quarter:
            return &decode_kernel<Refine::quarter, kFlipped, In, T>;
        case Refine::dark:
            return &decode_kernel<Refine::dark, kFlipped, In, T>;
        case Refine::dark_udp:
            return &decode_kernel<Refine::dark_udp, kFlipped, In, T>;
        default:
            return &decode_kernel<Refine::none, kFlipped, In, T>;
    }
}

template <class In>
void launch_all(const DecodeCall& call, cudaStream_t stream) {
    typedef typename AccumulationOf<In>::type T;
    DecodeLaunch<T> launch;
    launch.call = call;
    launch.call.swap = nullptr;  // in host memory; replaced by launch.swap
    const int64_t pixels = static_cast<int64_t>(call.H) * call.W;
    // A warp per map up to 1024 pixels (8 loads of 16 bytes per lane in float32): with a block, each thread would issue
    // at most two loads. 256 threads from 96 x 96 pixels on, where 128 would need more than four rounds of loads.
    launch.group = pixels <= 1024 ? kWarp : pixels < 9216 ? kBlockThreads : kMaxBlockThreads;
    const int threads = std::max(launch.group, kBlockThreads), groups = threads / launch.group;
    const BlurWeights blur = blur_weights(call.blur_kernel);
    launch.radius = blur.radius;
    for (int d = 0; d <= blur.radius; ++d) launch.weights[d] = static_cast<T>(blur.weights[d]);
    launch.buffer = 0;
    if (uses_blur(call.refine)) {
        const int window = 5 * (5 + 2 * blur.radius);  // DARK's five rows; larger than the halo of a tile row
        launch.buffer = (std::max(window, launch.group == kWarp ? 256 : 1024) + 3) / 4 * 4;
    }
    const size_t shared_bytes = groups * (sizeof(GroupStorage<T>) + launch.buffer * sizeof(T));

    const auto kernel = call.flipped ? kernel_for<In, T, true>(call.refine) : kernel_for<In, T, false>(call.refine);
    const int64_t step = call.flipped ? kLaunchJoints : call.K;
    for (int64_t first = 0; first < call.K; first += step) {
        launch.first_joint = first;
        launch.num_joints = std::min(step, call.K - first);
        if (call.flipped)
            for (int64_t j = 0; j < launch.num_joints; ++j) launch.swap[j] = static_cast<int>(call.swap[first + j]);
        const int64_t blocks = (call.B * launch.num_joints + groups - 1) / groups;
        void* arguments[] = {&launch};
        if (blocks > INT32_MAX)
            throw std::runtime_error("decode_heatmaps on CUDA: expected at most 2^31 - 1 blocks, got " +
                                     std::to_string(blocks));
        check(cudaLaunchKernel(kernel, dim3(static_cast<unsigned>(blocks)), dim3(threads), arguments, shared_bytes,
                               stream));
    }
}

}  // namespace

void decode_heatmaps_cuda(const DecodeCall& call, int device, void* stream) {
    if (call.B * call.K == 0) return;
    // The caller has made the device current. This copy of the CUDA runtime may see another one, where no context has
    // been used yet; it must not return to that one afterwards, which would create a context on it.
    int current;
    check(cudaGetDevice(&current));
    if (current != device) check(cudaSetDevice(device));
    const cudaStream_t cuda_stream = static_cast<cudaStream_t>(stream);
    switch (call.dtype) {
        case Dtype::float64:
            launch_all<double>(call, cuda_stream);
            break;
        case Dtype::float16:
            launch_all<__half>(call, cuda_stream);
            break;
        case Dtype::bfloat16:
            launch_all<__nv_bfloat16>(call, cuda_stream);
            break;
        default:
            launch_all<float>(call, cuda_stream);
    }
}

}  // namespace amil
