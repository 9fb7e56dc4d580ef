// The forward and backward passes of adjust pooling as sequences of kernels (simd/) over a schedule (schedule.h).
#include "adjust_pool/adjust_pool.h"

#include <algorithm>
#include <vector>

#include "adjust_pool/kernels.h"
#include "adjust_pool/schedule.h"
#include "build_info.h"
#include "runtime/instruction_set.h"

namespace amil {
namespace {

const ForwardKernels& forward_kernels(Dtype dtype) {
    switch (instruction_set()) {
#if AMIL_WITH_X86_SIMD
        case InstructionSet::avx512:
            return avx512::adjust_pool_forward_kernels(dtype);
        case InstructionSet::avx2:
            return avx2::adjust_pool_forward_kernels(dtype);
#endif
        default:
            return baseline::adjust_pool_forward_kernels(dtype);
    }
}

const BackwardKernels& backward_kernels(Dtype dtype) {
    switch (instruction_set()) {
#if AMIL_WITH_X86_SIMD
        case InstructionSet::avx512:
            return avx512::adjust_pool_backward_kernels(dtype);
        case InstructionSet::avx2:
            return avx2::adjust_pool_backward_kernels(dtype);
#endif
        default:
            return baseline::adjust_pool_backward_kernels(dtype);
    }
}

// Distributes what remains to be written of the previous bag's gradient over `passes` passes over `bag`, provided that
// the bag and the gradient fit the L2 cache together.
OverlappedWrite overlapped_write(const BackwardBag& bag, BackwardBag* previous, int passes) {
    if (!previous || !bag.m) return {nullptr, 0};
    const int64_t gradient_bytes = previous->non_temporal_stores ? 0 : previous->approximate_bytes();
    if (bag.approximate_bytes() + gradient_bytes > l2_for_two_bags()) return {nullptr, 0};
    const int64_t blocks = passes * ((bag.m + kBlock - 1) / kBlock);
    const int64_t remaining = (previous->m - previous->rows_written + kBlock - 1) / kBlock;
    return {previous, (remaining + blocks - 1) / blocks};
}

}  // namespace

void adjust_pool_forward(const Bags& bags, const ForwardOutputs& out) {
    const ForwardKernels& kernels = forward_kernels(bags.dtype);
    ForwardBag prototype{};
    prototype.sigma = out.sigma;
    prototype.softmax_stats = out.softmax_stats;
    prototype.bag = out.bag;
    prototype.weights = out.weights;
    ForwardSchedule schedule(bags, prototype);
    schedule.run(
        [&](ForwardBag& bag, ForwardBag*, void* stage) {
            for (int t = 1; t <= bag.T; ++t) {
                // Alternate directions: the chunks that the previous pass read last are still in the cache.
                for (int64_t k = 0; k < bag.num_chunks; ++k)
                    kernels.chunk(bag, t, t % 2 ? k : bag.num_chunks - 1 - k, stage);
                kernels.merge(bag, t);
            }
            if (bag.weights)
                for (int64_t k = 0; k < bag.num_chunks; ++k) kernels.weights_chunk(bag, k);
        },
        [](ForwardBag&, void*) {},
        [&](std::vector<ForwardSchedule::Slot>& slots) {
            for (int t = 1; t <= bags.T; ++t)
                schedule.for_chunks(
                    slots, [&](ForwardBag& bag, int64_t k, void* stage) { kernels.chunk(bag, t, k, stage); },
                    [&](ForwardBag& bag) { kernels.merge(bag, t); });
            if (out.weights)
                schedule.for_chunks(
                    slots, [&](ForwardBag& bag, int64_t k, void*) { kernels.weights_chunk(bag, k); },
                    [](ForwardBag&) {});
        });
}

void adjust_pool_backward(const Bags& bags, const BackwardArguments& args) {
    const BackwardKernels& kernels = backward_kernels(bags.dtype);
    BackwardBag prototype{};
    prototype.sigma = args.sigma;
    prototype.softmax_stats = args.softmax_stats;
    prototype.grad_bag = args.grad_bag;
    prototype.grad_weights = args.grad_weights;
    prototype.grad_f = args.grad_instances;
    prototype.detach_routing = args.detach_routing;
    // The iterations T .. first_t have a gradient through their weights.
    const int first_t = std::max(args.detach_routing ? bags.T : 2, 2);
    const bool with_weights = args.grad_weights && bags.T > 1 && !args.detach_routing;
    const auto write_rest = [&](BackwardBag& bag, void* stage) {
        if (bag.rows_written < bag.m) kernels.write(bag, bag.rows_written, bag.m, stage);
    };
    BackwardSchedule schedule(bags, prototype);
    schedule.run(
        [&](BackwardBag& bag, BackwardBag* previous, void* stage) {
            kernels.begin(bag);
            if (with_weights) {
                for (int64_t k = 0; k < bag.num_chunks; ++k) kernels.weights_dot_chunk(bag, k, stage);
                kernels.weights_dot_merge(bag);
            }
            for (int t = bag.T; t >= first_t; --t) {
                // From the second pass on this bag comes from the cache, which leaves memory bandwidth for writing the
                // gradient of the previous one.
                const OverlappedWrite write =
                    t < bag.T ? overlapped_write(bag, previous, t - first_t + 1) : OverlappedWrite{nullptr, 0};
                for (int64_t k = 0; k < bag.num_chunks; ++k)
                    kernels.chunk(bag, t, (bag.T - t) % 2 ? bag.num_chunks - 1 - k : k, stage, write);
                if (!bag.detach_routing) kernels.merge(bag, t);
            }
            kernels.end(bag);
            if (previous) write_rest(*previous, stage);
            if (bag.m == 0) kernels.write(bag, 0, 0, stage);
        },
        write_rest,
        [&](std::vector<BackwardSchedule::Slot>& slots) {
            schedule.for_bags(slots, [&](BackwardBag& bag) { kernels.begin(bag); });
            if (with_weights)
                schedule.for_chunks(
                    slots, [&](BackwardBag& bag, int64_t k, void* stage) { kernels.weights_dot_chunk(bag, k, stage); },
                    [&](BackwardBag& bag) { kernels.weights_dot_merge(bag); });
            for (int t = bags.T; t >= first_t; --t)
                schedule.for_chunks(
                    slots,
                    [&](BackwardBag& bag, int64_t k, void* stage) { kernels.chunk(bag, t, k, stage, {nullptr, 0}); },
                    [&](BackwardBag& bag) {
                        if (!bag.detach_routing) kernels.merge(bag, t);
                    });
            schedule.for_bags(slots, [&](BackwardBag& bag) { kernels.end(bag); });
            schedule.for_chunks(
                slots,
                [&](BackwardBag& bag, int64_t k, void* stage) {
                    const int64_t begin = k * bag.chunk_rows;
                    kernels.write(bag, begin, std::min(begin + bag.chunk_rows, bag.m), stage);
                },
                [](BackwardBag&) {});
        });
}

}  // namespace amil
