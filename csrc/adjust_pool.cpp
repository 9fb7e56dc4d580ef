// The plan: which thread does which piece of which bag. The arithmetic is in simd/adjust_pool_kernels.cpp.
#include "adjust_pool.h"

#include <algorithm>
#include <cstdlib>
#include <memory>
#include <new>
#include <numeric>
#include <vector>

#include "adjust_pool_kernels.h"
#include "parallel.h"

namespace amil {
namespace {

// A bag that is to be read again while it is still in the cache goes to one thread whole; from this size on it wouldn't
// be.
constexpr int64_t kMostBytesPerThread = 4 << 20;
// Small bags are handed out in groups of about this size, so that handing out costs nothing.
constexpr int64_t kLeastBytesPerTask = 64 << 10;

struct Free {
    void operator()(void* p) const { std::free(p); }
};
using Buffer = std::unique_ptr<char, Free>;

// Bytes at a cache line's boundary, not initialised.
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

    // Calls whole(bag, stage) for every bag that one thread does, and first, with all of the others, split(bags).
    template <class Whole, class Split>
    void run(Whole whole, Split split) {
        if (!split_.empty()) {
            std::vector<BagWork> works(split_.size());
            std::vector<std::vector<int64_t>> indices(split_.size());
            std::vector<Buffer> scratch;
            for (size_t k = 0; k < split_.size(); ++k) {
                works[k] = work(split_[k], indices[k]);
                scratch.push_back(allocate(scratch_bytes(works[k])));
                place_scratch(works[k], scratch.back().get());
            }
            split(works);
        }
        parallel_for(static_cast<int64_t>(groups_.size()), bags_.num_threads, [&](int64_t g) {
            const Buffer stage = make_stage();
            std::vector<int64_t> index;
            Buffer scratch;
            int64_t size = 0;
            for (int64_t b = groups_[g].begin; b < groups_[g].end; ++b) {
                BagWork bag = work(b, index);
                const int64_t needed = scratch_bytes(bag);
                if (needed > size) scratch = allocate(size = needed);
                place_scratch(bag, scratch.get());
                whole(bag, stage.get());
            }
        });
    }

    // Calls piece(bag, chunk, stage) for every chunk of every bag, then merge(bag) for every bag.
    template <class Piece, class Merge>
    void for_chunks(std::vector<BagWork>& works, Piece piece, Merge merge) {
        std::vector<int64_t> first(works.size() + 1, 0);
        for (size_t k = 0; k < works.size(); ++k) first[k + 1] = first[k] + works[k].chunks;
        parallel_for(first.back(), bags_.num_threads, [&](int64_t task) {
            const size_t k = std::upper_bound(first.begin(), first.end(), task) - first.begin() - 1;
            const Buffer stage = make_stage();
            piece(works[k], task - first[k], stage.get());
        });
        parallel_for(static_cast<int64_t>(works.size()), bags_.num_threads, [&](int64_t k) { merge(works[k]); });
    }

  private:
    struct Group {
        int64_t begin, end, bytes;
    };

    int64_t rows_in_memory(int64_t b) const {
        return bags_.offsets ? bags_.offsets[b + 1] - bags_.offsets[b] : bags_.N;
    }

    // Bag b with its pointers set; index holds the rows of a mask that isn't a prefix.
    BagWork work(int64_t b, std::vector<int64_t>& index) const {
        BagWork bag = prototype_;
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
                index.resize(bag.m);
                for (int64_t i = 0, r = 0; r < bag.m; ++i)
                    if (mask[i]) index[r++] = i;
                bag.index = index.data();
            }
        }
        bag.chunks = std::max<int64_t>((bag.m + bag.chunk_rows - 1) / bag.chunk_rows, 1);
        return bag;
    }

    int64_t vectors_bytes(const BagWork& bag) const { return BagWork::num_vectors(bag.T) * bag.Dp * acc_; }
    int64_t partials_bytes(const BagWork& bag) const { return bag.chunks * (kBlock + bag.Dp) * acc_; }
    int64_t scratch_bytes(const BagWork& bag) const {
        return vectors_bytes(bag) + partials_bytes(bag) + (backward_ ? 2 * (bag.T - 1) * bag.m * acc_ : 0);
    }
    void place_scratch(BagWork& bag, char* scratch) const {
        bag.vectors = scratch;
        bag.partials = scratch + vectors_bytes(bag);
        bag.coefficients = scratch + vectors_bytes(bag) + partials_bytes(bag);
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
        [&](BagWork& bag, void* stage) {
            for (int t = 1; t <= bag.T; ++t) {
                // There and back again: what the last pass read last is still in the cache.
                for (int64_t k = 0; k < bag.chunks; ++k)
                    kernels.forward_chunk(bag, t, t % 2 ? k : bag.chunks - 1 - k, stage);
                kernels.forward_merge(bag, t);
            }
            if (bag.weights)
                for (int64_t k = 0; k < bag.chunks; ++k) kernels.weights_chunk(bag, k);
        },
        [&](std::vector<BagWork>& works) {
            for (int t = 1; t <= bags.T; ++t)
                plan.for_chunks(
                    works, [&](BagWork& bag, int64_t k, void* stage) { kernels.forward_chunk(bag, t, k, stage); },
                    [&](BagWork& bag) { kernels.forward_merge(bag, t); });
            if (out.weights)
                plan.for_chunks(
                    works, [&](BagWork& bag, int64_t k, void*) { kernels.weights_chunk(bag, k); }, [](BagWork&) {});
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
    const int last = args.detach_routing ? bags.T : 2;  // iterations before it have no gradient through their weights
    const bool with_weights = args.grad_weights && bags.T > 1 && !args.detach_routing;
    Plan plan(bags, prototype, true);
    plan.run(
        [&](BagWork& bag, void* stage) {
            kernels.backward_begin(bag);
            if (with_weights) {
                for (int64_t k = 0; k < bag.chunks; ++k) kernels.backward_weights_chunk(bag, k, stage);
                kernels.backward_weights_merge(bag);
            }
            for (int t = bag.T; t >= std::max(last, 2); --t) {
                for (int64_t k = 0; k < bag.chunks; ++k)
                    kernels.backward_chunk(bag, t, (bag.T - t) % 2 ? bag.chunks - 1 - k : k, stage);
                if (!bag.detach_routing) kernels.backward_merge(bag, t);
            }
            kernels.backward_end(bag);
            for (int64_t k = 0; k < bag.chunks; ++k) kernels.backward_write(bag, k, stage);
        },
        [&](std::vector<BagWork>& works) {
            parallel_for(static_cast<int64_t>(works.size()), bags.num_threads,
                         [&](int64_t k) { kernels.backward_begin(works[k]); });
            if (with_weights)
                plan.for_chunks(
                    works, [&](BagWork& bag, int64_t k, void* stage) { kernels.backward_weights_chunk(bag, k, stage); },
                    [&](BagWork& bag) { kernels.backward_weights_merge(bag); });
            for (int t = bags.T; t >= std::max(last, 2); --t)
                plan.for_chunks(
                    works, [&](BagWork& bag, int64_t k, void* stage) { kernels.backward_chunk(bag, t, k, stage); },
                    [&](BagWork& bag) {
                        if (!bag.detach_routing) kernels.backward_merge(bag, t);
                    });
            for (BagWork& bag : works) kernels.backward_end(bag);
            plan.for_chunks(
                works, [&](BagWork& bag, int64_t k, void* stage) { kernels.backward_write(bag, k, stage); },
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
