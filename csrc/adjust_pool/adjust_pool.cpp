// The plan: which thread does which piece of which bag. The arithmetic is in simd/adjust_pool_kernels.cpp.
#include "adjust_pool/adjust_pool.h"

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <memory>
#include <new>
#include <numeric>
#include <vector>

#include "adjust_pool/kernels.h"
#include "runtime/caches.h"
#include "runtime/parallel.h"

#if defined(__SSE__)
#include <xmmintrin.h>
#endif

namespace amil {
namespace {

// A bag that is to be read again while it is still in the cache goes to one thread whole; from this size on it wouldn't
// be.
constexpr int64_t kMostBytesPerThread = 4 << 20;
// What of a core's L2 cache two bags may take.
int64_t l2_for_two_bags() { return caches().l2 * 3 / 4; }
// Small bags are handed out in groups of about this size, so that handing out costs nothing.
constexpr int64_t kLeastBytesPerTask = 64 << 10;

// Counts subnormal numbers as 0 while it lives: weights far from a bag's center are that small, and each would cost a
// hundred cycles.
class FlushSubnormals {
  public:
#if defined(__SSE__)
    FlushSubnormals() : before_(_mm_getcsr()) { _mm_setcsr(before_ | 0x8040); }
    ~FlushSubnormals() { _mm_setcsr(before_); }

  private:
    unsigned before_;
#else
    FlushSubnormals() {}
#endif
};

struct Free {
    void operator()(void* p) const { std::free(p); }
};
using Buffer = std::unique_ptr<char, Free>;

// Bytes at a cache line's boundary, not initialized.
Buffer allocate(int64_t bytes) {
    void* p = nullptr;
    if (posix_memalign(&p, 64, std::max<int64_t>(bytes, 64))) throw std::bad_alloc();
    return Buffer(static_cast<char*>(p));
}

template <class T>
void offset(T*& pointer, int64_t bytes) {
    if (pointer) pointer = reinterpret_cast<T*>(reinterpret_cast<uintptr_t>(pointer) + bytes);
}

// The bags of one call, and the order of work.
class Plan {
  public:
    Plan(const Bags& bags, const BagWork& prototype, bool backward)
        : bags_(bags), prototype_(prototype), backward_(backward), acc_(bags.dtype == Dtype::float64 ? 8 : 4) {
        prototype_.D = bags.D;
        prototype_.Dp = (bags.D + kBlock - 1) / kBlock * kBlock;
        prototype_.T = bags.T;
        prototype_.row_stride = bags.row_stride;
        const int64_t row_bytes = prototype_.Dp * acc_;
        prototype_.chunk_rows = std::max<int64_t>(kChunkBytes / row_bytes / kBlock, 1) * kBlock;

        int64_t total = 0;
        for (int64_t b = 0; b < bags.B; ++b) total += (rows_in_memory(b) + 1) * row_bytes;
        // Instances and their gradient together: written past the cache, lines that it doesn't hold needn't be read
        // first (512 KiB a bag, 32 MiB in all, 32 MiB of L3 cache: the backward pass takes 0.6 times as long).
        prototype_.stream_out = 2 * total > caches().l3 * 3 / 4;
        const int64_t most =
            bags.num_threads == 1 ? INT64_MAX : std::min(kMostBytesPerThread, total / bags.num_threads / 2);
        const int64_t least = std::max(kLeastBytesPerTask, total / bags.num_threads / 16);
        int64_t group_bytes = 0;
        for (int64_t b = 0; b < bags.B; ++b) {
            const int64_t bytes = (rows_in_memory(b) + 1) * row_bytes;
            if (bytes > std::max(most, kLeastBytesPerTask)) {
                split_.push_back(b);
                group_bytes = 0;
                continue;
            }
            if (group_bytes == 0) groups_.push_back({b, b, 0});
            groups_.back().end = b + 1;
            groups_.back().bytes = group_bytes += bytes;
            if (group_bytes >= least) group_bytes = 0;
        }
        std::stable_sort(groups_.begin(), groups_.end(),
                         [](const Group& x, const Group& y) { return x.bytes > y.bytes; });
    }

    // Calls whole(bag, before, stage) for every bag that one thread does, where `before` is the bag that the thread did
    // before it or nullptr, and last(bag, stage) after a thread's last bag. First, with all of the others, it calls
    // split(slots).
    template <class Whole, class Last, class Split>
    void run(Whole whole, Last last, Split split) {
        if (!split_.empty()) {
            std::vector<Slot> slots(split_.size());
            for (size_t k = 0; k < split_.size(); ++k) prepare(slots[k], split_[k]);
            split(slots);
        }
        std::atomic<size_t> next{0};
        parallel_for(std::min<int64_t>(groups_.size(), bags_.num_threads), bags_.num_threads, [&](int64_t) {
            const FlushSubnormals flush;
            const Buffer stage = make_stage();
            Slot slots[2];
            Slot *current = &slots[0], *before = nullptr;
            for (size_t group; (group = next++) < groups_.size();) {
                for (int64_t b = groups_[group].begin; b < groups_[group].end; ++b) {
                    prepare(*current, b);
                    if (!backward_ && b + 1 < groups_[group].end) fetch_beside(current->bag, b + 1);
                    whole(current->bag, before ? &before->bag : nullptr, stage.get());
                    before = current;
                    current = current == &slots[0] ? &slots[1] : &slots[0];
                }
            }
            if (before) last(before->bag, stage.get());
        });
    }

    // What to write of the bag before while `passes` passes go over `bag`: nothing if what is read and what is written
    // don't fit the L2 cache together.
    static Beside beside(const BagWork& bag, BagWork* before, int passes) {
        const int64_t written = before && !before->stream_out ? before->bytes() : 0;
        if (!before || !bag.m || bag.bytes() + written > l2_for_two_bags()) return {nullptr, 0};
        const int64_t blocks = passes * ((bag.m + kBlock - 1) / kBlock);
        return {before, ((before->m - before->written + kBlock - 1) / kBlock + blocks - 1) / blocks};
    }

    // A bag, and the memory that its pointers point to.
    struct Slot {
        BagWork bag;
        std::vector<int64_t> index;
        Buffer scratch;
        int64_t scratch_size = 0;
    };

    // Calls piece(bag, chunk, stage) for every chunk of every bag, then merge(bag) for every bag.
    template <class Piece, class Merge>
    void for_chunks(std::vector<Slot>& slots, Piece piece, Merge merge) {
        std::vector<int64_t> first(slots.size() + 1, 0);
        for (size_t k = 0; k < slots.size(); ++k) first[k + 1] = first[k] + slots[k].bag.chunks;
        parallel_for(first.back(), bags_.num_threads, [&](int64_t task) {
            const FlushSubnormals flush;
            const size_t k = std::upper_bound(first.begin(), first.end(), task) - first.begin() - 1;
            const Buffer stage = make_stage();
            piece(slots[k].bag, task - first[k], stage.get());
        });
        parallel_for(static_cast<int64_t>(slots.size()), bags_.num_threads, [&](int64_t k) { merge(slots[k].bag); });
    }

  private:
    struct Group {
        int64_t begin, end, bytes;
    };

    int64_t rows_in_memory(int64_t b) const {
        return bags_.offsets ? bags_.offsets[b + 1] - bags_.offsets[b] : bags_.N;
    }

    // Makes a slot bag b's, with its pointers set; slot.index holds the rows of a mask that isn't a prefix.
    void prepare(Slot& slot, int64_t b) const {
        BagWork& bag = slot.bag;
        bag = prototype_;
        bag.rows_in_memory = bag.m = rows_in_memory(b);
        const int64_t first_row = bags_.offsets ? bags_.offsets[b] : b * bags_.N;
        const int64_t size = size_of(bags_.dtype);
        offset(bag.f, (bags_.offsets ? bags_.offsets[b] * bags_.row_stride : b * bags_.bag_stride) * size);
        offset(bag.grad_f, first_row * bag.D * size);
        offset(bag.weights, first_row * acc_);
        offset(bag.grad_weights, first_row * acc_);
        offset(bag.bag, b * bag.D * size);
        offset(bag.grad_bag, b * bag.D * size);
        offset(bag.sigma, b * bag.T * bag.D * acc_);
        offset(bag.lse, b * bag.T * acc_);
        if (bags_.lengths) bag.m = bags_.lengths[b];
        if (bags_.mask) {
            const uint8_t* mask = bags_.mask + b * bags_.N;
            bag.m = bags_.N - std::count(mask, mask + bags_.N, 0);
            const bool prefix = std::find(mask, mask + bag.m, 0) == mask + bag.m;
            if (!prefix) {
                slot.index.resize(bag.m);
                for (int64_t i = 0, r = 0; r < bag.m; ++i)
                    if (mask[i]) slot.index[r++] = i;
                bag.index = slot.index.data();
            }
        }
        bag.chunks = std::max<int64_t>((bag.m + bag.chunk_rows - 1) / bag.chunk_rows, 1);

        const int64_t vectors = BagWork::num_vectors(bag.T) * bag.Dp * acc_;
        const int64_t partials = bag.chunks * (kBlock + bag.Dp) * acc_;
        // Rows that can't be used in place are copied in the first pass; where the copy stays in the L2 cache it serves
        // the others too.
        const bool in_place = size == acc_ && bag.D == bag.Dp;
        bag.stream_out = in_place && (bag.stream_out || bag.bytes() > caches().l2);
        bag.ahead = in_place && !bag.index && bag.bytes() > caches().l2 ? kBlock * bag.row_stride : 0;
        const int64_t copy = in_place || bag.T == 1 || bag.bytes() > l2_for_two_bags() / 2 ? 0 : bag.m * bag.Dp * acc_;
        const int64_t scratch = vectors + partials + copy + (backward_ ? 2 * (bag.T - 1) * bag.m * acc_ : 0);
        if (scratch > slot.scratch_size) slot.scratch = allocate(slot.scratch_size = scratch);
        bag.vectors = slot.scratch.get();
        bag.partials = slot.scratch.get() + vectors;
        bag.copy = copy ? slot.scratch.get() + vectors + partials : nullptr;
        bag.coefficients = slot.scratch.get() + vectors + partials + copy;
    }
    // Lets the passes over `bag` after the first fetch bag `next`, unless the two don't fit the L2 cache together.
    void fetch_beside(BagWork& bag, int64_t next) const {
        const int64_t rows = bags_.lengths ? bags_.lengths[next] : rows_in_memory(next);
        const int64_t bytes = rows * bags_.row_stride * size_of(bags_.dtype);
        if (bag.T == 1 || bag.m == 0 || bag.bytes() + bytes > l2_for_two_bags()) return;
        const int64_t start = bags_.offsets ? bags_.offsets[next] * bags_.row_stride : next * bags_.bag_stride;
        bag.fetch = static_cast<const char*>(bags_.instances) + start * size_of(bags_.dtype);
        bag.fetch_end = bag.fetch + bytes;
        const int64_t blocks = (bag.T - 1) * ((bag.m + kBlock - 1) / kBlock);
        bag.fetch_bytes = (bytes / blocks / kFetchStride + 1) * kFetchStride;
    }
    Buffer make_stage() const {
        const int64_t row = prototype_.Dp * acc_;
        Buffer stage = allocate((kBlock + 1) * row);
        std::fill_n(stage.get() + kBlock * row, row, 0);
        return stage;
    }

    const Bags& bags_;
    BagWork prototype_;
    bool backward_;
    int64_t acc_;
    std::vector<int64_t> split_;  // bags that several threads share
    std::vector<Group> groups_;   // of the others, long ones first
};

}  // namespace

void adjust_pool_forward(const Bags& bags, const ForwardOutputs& out) {
    const AdjustPoolKernels& kernels = adjust_pool_kernels(instruction_set(), bags.dtype);
    BagWork prototype{};
    prototype.f = bags.instances;
    prototype.bag = out.bag;
    prototype.weights = out.weights;
    prototype.sigma = out.sigma;
    prototype.lse = out.lse;
    Plan plan(bags, prototype, false);
    plan.run(
        [&](BagWork& bag, BagWork*, void* stage) {
            for (int t = 1; t <= bag.T; ++t) {
                // There and back again: what the last pass read last is still in the cache.
                for (int64_t k = 0; k < bag.chunks; ++k)
                    kernels.forward_chunk(bag, t, t % 2 ? k : bag.chunks - 1 - k, stage);
                kernels.forward_merge(bag, t);
            }
            if (bag.weights)
                for (int64_t k = 0; k < bag.chunks; ++k) kernels.weights_chunk(bag, k);
        },
        [](BagWork&, void*) {},
        [&](std::vector<Plan::Slot>& slots) {
            for (int t = 1; t <= bags.T; ++t)
                plan.for_chunks(
                    slots, [&](BagWork& bag, int64_t k, void* stage) { kernels.forward_chunk(bag, t, k, stage); },
                    [&](BagWork& bag) { kernels.forward_merge(bag, t); });
            if (out.weights)
                plan.for_chunks(
                    slots, [&](BagWork& bag, int64_t k, void*) { kernels.weights_chunk(bag, k); }, [](BagWork&) {});
        });
}

void adjust_pool_backward(const Bags& bags, const BackwardArguments& args) {
    const AdjustPoolKernels& kernels = adjust_pool_kernels(instruction_set(), bags.dtype);
    BagWork prototype{};
    prototype.f = bags.instances;
    prototype.sigma = args.sigma;
    prototype.lse = args.lse;
    prototype.grad_bag = args.grad_bag;
    prototype.grad_weights = args.grad_weights;
    prototype.grad_f = args.grad_instances;
    prototype.detach_routing = args.detach_routing;
    // Iterations before this one have no gradient through their weights.
    const int last = std::max(args.detach_routing ? bags.T : 2, 2);
    const bool with_weights = args.grad_weights && bags.T > 1 && !args.detach_routing;
    Plan plan(bags, prototype, true);
    plan.run(
        [&](BagWork& bag, BagWork* before, void* stage) {
            kernels.backward_begin(bag);
            if (with_weights) {
                for (int64_t k = 0; k < bag.chunks; ++k) kernels.backward_weights_chunk(bag, k, stage);
                kernels.backward_weights_merge(bag);
            }
            for (int t = bag.T; t >= last; --t) {
                // From the second pass on this bag comes from the cache, and the gradient of the one before can be
                // written.
                const Beside beside = t < bag.T ? Plan::beside(bag, before, t - last + 1) : Beside{nullptr, 0};
                for (int64_t k = 0; k < bag.chunks; ++k)
                    kernels.backward_chunk(bag, t, (bag.T - t) % 2 ? bag.chunks - 1 - k : k, stage, beside);
                if (!bag.detach_routing) kernels.backward_merge(bag, t);
            }
            kernels.backward_end(bag);
            if (before && before->written < before->m) kernels.backward_write(*before, before->m, stage);
            if (bag.m == 0) kernels.backward_write(bag, 0, stage);
        },
        [&](BagWork& bag, void* stage) {
            if (bag.written < bag.m) kernels.backward_write(bag, bag.m, stage);
        },
        [&](std::vector<Plan::Slot>& slots) {
            parallel_for(static_cast<int64_t>(slots.size()), bags.num_threads,
                         [&](int64_t k) { kernels.backward_begin(slots[k].bag); });
            if (with_weights)
                plan.for_chunks(
                    slots, [&](BagWork& bag, int64_t k, void* stage) { kernels.backward_weights_chunk(bag, k, stage); },
                    [&](BagWork& bag) { kernels.backward_weights_merge(bag); });
            for (int t = bags.T; t >= last; --t)
                plan.for_chunks(
                    slots,
                    [&](BagWork& bag, int64_t k, void* stage) {
                        kernels.backward_chunk(bag, t, k, stage, {nullptr, 0});
                    },
                    [&](BagWork& bag) {
                        if (!bag.detach_routing) kernels.backward_merge(bag, t);
                    });
            for (Plan::Slot& slot : slots) kernels.backward_end(slot.bag);
            plan.for_chunks(
                slots,
                [&](BagWork bag, int64_t k, void* stage) {
                    bag.written = k * bag.chunk_rows;
                    kernels.backward_write(bag, std::min(bag.written + bag.chunk_rows, bag.m), stage);
                },
                [](BagWork&) {});
        });
}

const AdjustPoolKernels& adjust_pool_kernels(InstructionSet instruction_set, Dtype dtype) {
    switch (instruction_set) {
#if defined(__x86_64__)
        case InstructionSet::avx512:
            return avx512::adjust_pool_kernels(dtype);
        case InstructionSet::avx2:
            return avx2::adjust_pool_kernels(dtype);
#endif
        default:
            return baseline::adjust_pool_kernels(dtype);
    }
}

}  // namespace amil
