// Emulates on the CPU the subset of CUDA that csrc/decode_heatmaps/decode_heatmaps.cu uses: the blocks of a kernel run
// sequentially, and the threads of a block are coroutines that switch at barriers. This verifies a kernel's results and
// the absence of deadlocks, but not races, memory spaces or speed.
#pragma once

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <ucontext.h>

#include <stdexcept>
#include <vector>

#define __host__
#define __device__
#define __global__
#define __shared__
#define __forceinline__ inline
#define __align__(n) __attribute__((aligned(n)))
#define __launch_bounds__(...)
#define __grid_constant__

struct dim3 {
    unsigned x, y = 1, z = 1;
    dim3(unsigned size = 1) : x(size) {}
};

using cudaStream_t = void*;
using cudaError_t = int;
constexpr cudaError_t cudaSuccess = 0;
inline const char* cudaGetErrorString(cudaError_t) { return "failed"; }
// Decoding runs on device 1. Device 0 is current before, but making it current again would create a context on it.
inline cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
inline cudaError_t cudaSetDevice(int device) { return device == 1 ? cudaSuccess : 1; }

inline int max(int a, int b) { return a > b ? a : b; }
inline int min(int a, int b) { return a < b ? a : b; }

namespace cuda_on_cpu {

constexpr int kWarp = 32;

struct Barrier {
    int waiting = 0, phase = 0;
};

struct EmulatedThread {
    ucontext_t context;
    std::vector<char> stack;
    bool done;
};

struct EmulatedBlock {
    std::vector<EmulatedThread> threads;
    ucontext_t scheduler;
    int current = 0, steps_without_progress = 0;
    Barrier all;
    std::vector<Barrier> warps;
    std::vector<uint64_t> slots;  // the value that each thread exchanges with its warp
};
inline EmulatedBlock block;
inline dim3 thread_index, block_index, block_size, grid_size;

inline void yield() { swapcontext(&block.threads[block.current].context, &block.scheduler); }

inline void wait(Barrier& barrier, int members) {
    const int phase = barrier.phase;
    block.steps_without_progress = 0;
    if (++barrier.waiting == members) {
        barrier.waiting = 0;
        ++barrier.phase;
        return;
    }
    while (barrier.phase == phase) yield();
}
inline void wait_for_warp() { wait(block.warps[block.current / kWarp], kWarp); }

template <class T>
T exchange(T value, int lane) {
    static_assert(sizeof(T) <= sizeof(uint64_t));
    const int first = block.current / kWarp * kWarp;
    memcpy(&block.slots[block.current], &value, sizeof(T));
    wait_for_warp();
    T other;
    memcpy(&other, &block.slots[first + lane], sizeof(T));
    wait_for_warp();
    return other;
}

template <class Arguments>
struct Entry {
    static inline void (*kernel)(Arguments);
    static inline const Arguments* arguments;
    static void run() {
        kernel(*arguments);
        block.threads[block.current].done = true;
        block.steps_without_progress = 0;
        yield();
    }
};

template <class Arguments>
void run_block(unsigned size) {
    block.threads.resize(size);
    block.warps.assign((size + kWarp - 1) / kWarp, Barrier());
    block.all = Barrier();
    block.slots.resize(size);
    for (EmulatedThread& thread : block.threads) {
        thread.stack.resize(64 << 10);
        thread.done = false;
        getcontext(&thread.context);
        thread.context.uc_stack.ss_sp = thread.stack.data();
        thread.context.uc_stack.ss_size = thread.stack.size();
        thread.context.uc_link = nullptr;
        makecontext(&thread.context, Entry<Arguments>::run, 0);
    }
    for (unsigned left = size; left;) {
        for (unsigned t = 0; t < size; ++t) {
            if (block.threads[t].done) continue;
            block.current = static_cast<int>(t);
            thread_index = dim3(t);
            if (++block.steps_without_progress > 2 * static_cast<int>(size))
                throw std::runtime_error("deadlock: all threads of a block wait at barriers");
            swapcontext(&block.scheduler, &block.threads[t].context);
            left -= block.threads[t].done;
        }
    }
}

}  // namespace cuda_on_cpu

#define threadIdx cuda_on_cpu::thread_index
#define blockIdx cuda_on_cpu::block_index
#define blockDim cuda_on_cpu::block_size
#define gridDim cuda_on_cpu::grid_size

inline void __syncthreads() { cuda_on_cpu::wait(cuda_on_cpu::block.all, static_cast<int>(cuda_on_cpu::block_size.x)); }
inline void __syncwarp() { cuda_on_cpu::wait_for_warp(); }
template <class T>
T __shfl_xor_sync(unsigned, T value, int distance) {
    return cuda_on_cpu::exchange(value, (cuda_on_cpu::block.current % cuda_on_cpu::kWarp) ^ distance);
}
inline int __any_sync(unsigned, bool value) {
    int any = 0;
    for (int lane = 0; lane < cuda_on_cpu::kWarp; ++lane) any |= cuda_on_cpu::exchange(static_cast<int>(value), lane);
    return any;
}

// The kernel's dynamic shared memory, filled with 0xff bytes before each block.
inline unsigned char* shared_memory_on_cpu();
inline size_t shared_memory_on_cpu_size();

template <class Arguments>
cudaError_t cudaLaunchKernel(void (*kernel)(Arguments), dim3 grid, dim3 threads, void** arguments, size_t shared_bytes,
                             cudaStream_t) {
    using namespace cuda_on_cpu;
    if (sizeof(Arguments) > 4096) throw std::runtime_error("kernel arguments: expected at most 4 KiB");
    if (shared_bytes > 48 << 10 || shared_bytes > shared_memory_on_cpu_size())
        throw std::runtime_error("shared memory of a block: expected at most 48 KiB");
    Entry<Arguments>::kernel = kernel;
    Entry<Arguments>::arguments = static_cast<const Arguments*>(arguments[0]);
    grid_size = grid, block_size = threads;
    for (unsigned b = 0; b < grid.x; ++b) {
        block_index = dim3(b);
        memset(shared_memory_on_cpu(), 0xff, shared_memory_on_cpu_size());
        run_block<Arguments>(threads.x);
        for (size_t i = shared_bytes; i < shared_memory_on_cpu_size(); ++i)
            if (shared_memory_on_cpu()[i] != 0xff)
                throw std::runtime_error("a block wrote past the end of its shared memory");
    }
    return cudaSuccess;
}
