// Runs tasks on torch's own OpenMP threads.
#pragma once

#include <cstdint>
#include <functional>

namespace amil {

// Calls task(i) for i = 0 .. num_tasks - 1, in unspecified order, on at most num_threads threads, and returns when all
// calls have finished. Tasks are assigned dynamically, one at a time, so they may differ in length; the longest should
// come first. If a task throws, no further tasks are started, and the first exception is rethrown in the calling thread
// once all threads have returned: OpenMP requires that none leaves its thread.
void parallel_for(int64_t num_tasks, int num_threads, const std::function<void(int64_t)>& task);

}  // namespace amil
