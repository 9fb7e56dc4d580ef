// Runs tasks on the OpenMP threads that torch already has.
#pragma once

#include <cstdint>
#include <functional>

namespace amil {

// Calls task(i) for i = 0 .. num_tasks - 1, in no promised order, on at most num_threads threads; returns when all are
// done. Tasks are handed out one at a time, so they may differ in length; put the long ones first. A task must not
// throw.
void parallel_for(int64_t num_tasks, int num_threads, const std::function<void(int64_t)>& task);

}  // namespace amil
