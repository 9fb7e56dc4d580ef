// Scheduling of adjust pooling: which thread processes which bag or chunk, and with which scratch memory. The
// arithmetic is in simd/.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>
#include <type_traits>
#include <vector>

#include "adjust_pool/adjust_pool.h"
#include "adjust_pool/kernels.h"
#include "runtime/caches.h"
#include "runtime/parallel.h"

#if defined(__SSE__)
#include <xmmintrin.h>
#endif

namespace amil {

// A bag that is reread while it is still cached is processed by a single thread; larger bags would not stay cached.
constexpr int64_t kMaxBytesPerThread = 4 << 20;
// Small bags are grouped into tasks of about this size to make the cost of distributing them negligible.
constexpr int64_t kMinBytesPerTask = 64 << 10;

// L2 budget for two resident bags.
inline int64_t l2_for_two_bags() { return caches().l2 * 3 / 4; }

// Treats subnormal numbers as 0 during its lifetime: the weights of instances far from a bag's center are that small,
// and each operation on one would cost about a hundred cycles.
class FlushSubnormals {
  public:
#if defined(__SSE__)
    FlushSubnormals() : saved_(_mm_getcsr()) { _mm_setcsr(saved_ | 0x8040); }
    ~FlushSubnormals() { _mm_setcsr(saved_); }

  private:
    unsigned saved_;
#else
    FlushSubnormals() {}
#endif
};

struct FreeMemory {
    void operator()(void* p) const { std::free(p); }
};
using Buffer = std::unique_ptr<char, FreeMemory>;

// Uninitialized memory, aligned to a cache line.
inline Buffer allocate(int64_t bytes) {
    void* p = nullptr;
    if (posix_memalign(&p, 64, std::max<int64_t>(bytes, 64))) throw std::bad_alloc();
    return Buffer(static_cast<char*>(p));
}

// Advances a pointer by bytes unless it is nullptr.
template <class T>
void offset(T*& pointer, int64_t bytes) {
    if (pointer) pointer = reinterpret_cast<T*>(reinterpret_cast<uintptr_t>(pointer) + bytes);
}

// The order of work of one call. `Bag` is ForwardBag or BackwardBag.
template <class Bag>
class Schedule {
  public:
    // A bag and the memory that its pointers refer to.
    struct Slot {
        Bag bag;
        std::vector<int64_t> index;
        Buffer scratch;
        int64_t scratch_size = 0;
    };

    // `prototype` holds the batch's tensors; the pointers of each bag are offset from them.
    Schedule(const Bags& bags, const Bag& prototype)
        : bags_(bags), prototype_(prototype), acc_size_(bags.dtype == Dtype::float64 ? 8 : 4) {
        prototype_.f = bags.instances;
        prototype_.row_stride = bags.row_stride;
        prototype_.D = bags.D;
        prototype_.Dp = (bags.D + kBlock - 1) / kBlock * kBlock;
        prototype_.T = bags.T;
        const int64_t row_bytes = prototype_.Dp * acc_size_;
        prototype_.chunk_rows = std::max<int64_t>(kChunkBytes / row_bytes / kBlock, 1) * kBlock;

        int64_t total = 0;
        for (int64_t b = 0; b < bags.B; ++b) total += (rows_in_memory(b) + 1) * row_bytes;
        // Instances and their gradient together: non-temporal stores do not read the destination's cache lines first
        // (512 KiB per bag, 32 MiB in total, 32 MiB of L3 cache: the backward pass takes 0.6 times as long).
        exceeds_l3_ = 2 * total > caches().l3 * 3 / 4;
        const int64_t most =
            bags.num_threads == 1 ? INT64_MAX : std::min(kMaxBytesPerThread, total / bags.num_threads / 2);
        const int64_t least = std::max(kMinBytesPerTask, total / bags.num_threads / 16);
        int64_t group_bytes = 0;
        for (int64_t b = 0; b < bags.B; ++b) {
            const int64_t bytes = (rows_in_memory(b) + 1) * row_bytes;
            if (bytes > std::max(most, kMinBytesPerTask)) {
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
                         [](const BagGroup& x, const BagGroup& y) { return x.bytes > y.bytes; });
    }

    // First calls split(slots) with the bags that several threads share. Then calls whole(bag, previous, stage) for
    // every other bag, where `previous` is the bag that the same thread processed before it or nullptr, and
    // last(bag, stage) after the last bag of each thread.
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
            Slot *current = &slots[0], *previous = nullptr;
            for (size_t group; (group = next++) < groups_.size();) {
                for (int64_t b = groups_[group].begin; b < groups_[group].end; ++b) {
                    prepare(*current, b);
                    if constexpr (kForward)
                        if (b + 1 < groups_[group].end) prefetch_next(current->bag, b + 1);
                    whole(current->bag, previous ? &previous->bag : nullptr, stage.get());
                    previous = current;
                    current = current == &slots[0] ? &slots[1] : &slots[0];
                }
            }
            if (previous) last(previous->bag, stage.get());
        });
    }

    // Calls piece(bag, chunk, stage) for every chunk of every bag, then merge(bag) for every bag.
    template <class Piece, class Merge>
    void for_chunks(std::vector<Slot>& slots, Piece piece, Merge merge) {
        std::vector<int64_t> first(slots.size() + 1, 0);
        for (size_t k = 0; k < slots.size(); ++k) first[k + 1] = first[k] + slots[k].bag.num_chunks;
        parallel_for(first.back(), bags_.num_threads, [&](int64_t task) {
            const FlushSubnormals flush;
            const size_t k = std::upper_bound(first.begin(), first.end(), task) - first.begin() - 1;
            const Buffer stage = make_stage();
            piece(slots[k].bag, task - first[k], stage.get());
        });
        for_bags(slots, merge);
    }

    // Calls function(bag) for every bag.
    template <class Function>
    void for_bags(std::vector<Slot>& slots, Function function) {
        parallel_for(static_cast<int64_t>(slots.size()), bags_.num_threads, [&](int64_t k) {
            const FlushSubnormals flush;
            function(slots[k].bag);
        });
    }

  private:
    static constexpr bool kForward = std::is_same_v<Bag, ForwardBag>;

    // Consecutive bags begin .. end - 1 that one thread processes.
    struct BagGroup {
        int64_t begin, end, bytes;
    };

    int64_t rows_in_memory(int64_t b) const {
        return bags_.offsets ? bags_.offsets[b + 1] - bags_.offsets[b] : bags_.N;
    }

    // Sets up a slot for bag b; slot.index receives the positions of the real rows if the mask is not a prefix.
    void prepare(Slot& slot, int64_t b) const {
        Bag& bag = slot.bag;
        bag = prototype_;
        bag.rows_in_memory = bag.m = rows_in_memory(b);
        const int64_t size = size_of(bags_.dtype);
        offset(bag.f, (bags_.offsets ? bags_.offsets[b] * bags_.row_stride : b * bags_.bag_stride) * size);
        offset_tensors(bag, b, bags_.offsets ? bags_.offsets[b] : b * bags_.N);
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
        bag.num_chunks = std::max<int64_t>((bag.m + bag.chunk_rows - 1) / bag.chunk_rows, 1);

        // Rows that cannot be used in place are converted in the first pass. If the copy fits the L2 cache, later
        // passes reuse it.
        const bool in_place = size == acc_size_ && bag.D == bag.Dp;
        const bool exceeds_l2 = bag.approximate_bytes() > caches().l2;
        bag.prefetch_distance = in_place && !bag.index && exceeds_l2 ? kBlock * bag.row_stride : 0;
        const bool copied = !in_place && bag.T > 1 && bag.approximate_bytes() <= l2_for_two_bags() / 2;

        const int64_t vectors = Bag::num_vectors(bag.T) * bag.Dp * acc_size_;
        const int64_t partials = bag.num_chunks * (kBlock + bag.Dp) * acc_size_;
        const int64_t copy = copied ? bag.m * bag.Dp * acc_size_ : 0;
        int64_t coefficients = 0;
        if constexpr (!kForward) coefficients = 2 * (bag.T - 1) * bag.m * acc_size_;
        const int64_t scratch_size = vectors + partials + copy + coefficients;
        if (scratch_size > slot.scratch_size) slot.scratch = allocate(slot.scratch_size = scratch_size);
        char* const scratch = slot.scratch.get();
        bag.vectors = scratch;
        bag.partials = scratch + vectors;
        bag.copy = copy ? scratch + vectors + partials : nullptr;
        if constexpr (!kForward) {
            bag.coefficients = scratch + vectors + partials + copy;
            bag.non_temporal_stores = in_place && (exceeds_l3_ || exceeds_l2);
        }
    }

    // Offsets the tensors of the batch to bag b, whose first row in memory is first_row.
    void offset_tensors(ForwardBag& bag, int64_t b, int64_t first_row) const {
        offset(bag.sigma, b * bag.T * bag.D * acc_size_);
        offset(bag.softmax_stats, b * bag.T * 2 * acc_size_);
        offset(bag.bag, b * bag.D * size_of(bags_.dtype));
        offset(bag.weights, first_row * acc_size_);
    }
    void offset_tensors(BackwardBag& bag, int64_t b, int64_t first_row) const {
        offset(bag.sigma, b * bag.T * bag.D * acc_size_);
        offset(bag.softmax_stats, b * bag.T * 2 * acc_size_);
        offset(bag.grad_bag, b * bag.D * size_of(bags_.dtype));
        offset(bag.grad_weights, first_row * acc_size_);
        offset(bag.grad_f, first_row * bag.D * size_of(bags_.dtype));
    }

    // Lets all passes over `bag` but the first prefetch bag `next`, provided that both fit the L2 cache.
    void prefetch_next(ForwardBag& bag, int64_t next) const {
        const int64_t rows = bags_.lengths ? bags_.lengths[next] : rows_in_memory(next);
        const int64_t bytes = rows * bags_.row_stride * size_of(bags_.dtype);
        if (bag.T == 1 || bag.m == 0 || bag.approximate_bytes() + bytes > l2_for_two_bags()) return;
        const int64_t start = bags_.offsets ? bags_.offsets[next] * bags_.row_stride : next * bags_.bag_stride;
        bag.prefetch_begin = static_cast<const char*>(bags_.instances) + start * size_of(bags_.dtype);
        bag.prefetch_end = bag.prefetch_begin + bytes;
        const int64_t blocks = (bag.T - 1) * ((bag.m + kBlock - 1) / kBlock);
        bag.prefetch_bytes_per_block = (bytes / blocks / kPrefetchStride + 1) * kPrefetchStride;
    }

    Buffer make_stage() const {
        const int64_t row_bytes = prototype_.Dp * acc_size_;
        Buffer stage = allocate((kBlock + 1) * row_bytes);
        std::fill_n(stage.get() + kBlock * row_bytes, row_bytes, 0);
        return stage;
    }

    const Bags& bags_;
    Bag prototype_;
    int64_t acc_size_;              // bytes of an element of the accumulation type
    bool exceeds_l3_;               // instances and gradients don't fit the L3 cache
    std::vector<int64_t> split_;    // bags that several threads share
    std::vector<BagGroup> groups_;  // all other bags, largest groups first
};

using ForwardSchedule = Schedule<ForwardBag>;
using BackwardSchedule = Schedule<BackwardBag>;

}  // namespace amil
