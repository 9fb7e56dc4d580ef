#include "runtime/parallel.h"

#include <dlfcn.h>

#include <algorithm>
#include <atomic>
#include <exception>
#include <system_error>
#include <thread>
#include <vector>

namespace amil {
namespace {

// GCC's OpenMP entry point (LLVM's and Intel's runtimes provide it too). It is resolved in the running process rather
// than linked, so that tasks run on the same threads as torch's operators: a second thread pool would compete with them
// for the cores, because idle OpenMP threads spin.
using GompParallel = void (*)(void (*fn)(void*), void* data, unsigned num_threads, unsigned flags);

GompParallel find_gomp_parallel() { return reinterpret_cast<GompParallel>(dlsym(RTLD_DEFAULT, "GOMP_parallel")); }

struct ParallelJob {
    const std::function<void(int64_t)>& task;
    int64_t num_tasks;
    std::atomic<int64_t> next{0};
    std::atomic<bool> failed{false};
    std::exception_ptr error;  // written by the thread that sets `failed`

    void work() noexcept {
        try {
            for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < num_tasks;) task(i);
        } catch (...) {
            if (!failed.exchange(true)) error = std::current_exception();
            next.store(num_tasks, std::memory_order_relaxed);
        }
    }
};

}  // namespace

void parallel_for(int64_t num_tasks, int num_threads, const std::function<void(int64_t)>& task) {
    const int threads = static_cast<int>(std::min<int64_t>(num_tasks, num_threads));
    if (threads <= 1) {
        for (int64_t i = 0; i < num_tasks; ++i) task(i);
        return;
    }
    ParallelJob job{task, num_tasks};
    static const GompParallel gomp_parallel = find_gomp_parallel();
    if (gomp_parallel) {
        gomp_parallel([](void* data) { static_cast<ParallelJob*>(data)->work(); }, &job, static_cast<unsigned>(threads),
                      0);
    } else {
        std::vector<std::thread> others;
        others.reserve(threads - 1);
        try {
            for (int t = 1; t < threads; ++t) others.emplace_back([&job] { job.work(); });
        } catch (const std::system_error&) {
            // No more threads can be created; the existing ones run all tasks.
        }
        job.work();
        for (std::thread& thread : others) thread.join();
    }
    if (job.error) std::rethrow_exception(job.error);
}

}  // namespace amil
