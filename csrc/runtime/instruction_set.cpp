#include "runtime/instruction_set.h"

#include <algorithm>
#include <atomic>
#include <stdexcept>

#include "build_info.h"

namespace amil {
namespace {

const char* const kNames[] = {"baseline", "avx2", "avx512"};

int best() {
#if AMIL_WITH_X86_SIMD
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
    if (avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
        return 2;
    if (avx2) return 1;
#endif
    return 0;
}

std::atomic<int>& current() {
    static std::atomic<int> value{best()};
    return value;
}

}  // namespace

std::vector<std::string> usable_instruction_sets() { return {kNames, kNames + best() + 1}; }

InstructionSet instruction_set() { return static_cast<InstructionSet>(current().load(std::memory_order_relaxed)); }

std::string instruction_set_name() { return kNames[current().load()]; }

void set_instruction_set(const std::string& name) {
    const std::vector<std::string> usable = usable_instruction_sets();
    const auto found = std::find(usable.begin(), usable.end(), name);
    if (found == usable.end()) {
        std::string expected;
        for (const std::string& known : usable) expected += (expected.empty() ? "" : ", ") + known;
        throw std::invalid_argument("instruction set: expected one of " + expected + ", got " + name);
    }
    current().store(static_cast<int>(found - usable.begin()));
}

}  // namespace amil
