// The choice between the copies of the sources in csrc/*/simd that were compiled for different instruction sets.
#pragma once

#include <string>
#include <vector>

namespace amil {

enum class InstructionSet { baseline = 0, avx2 = 1, avx512 = 2 };

// What the running processor can execute, slowest first.
std::vector<std::string> usable_instruction_sets();

// The one in use: the last of the usable ones unless another was set.
InstructionSet instruction_set();
std::string instruction_set_name();

// Uses another one from now on, for tests and benchmarks. Throws std::invalid_argument if it isn't usable here.
void set_instruction_set(const std::string& name);

}  // namespace amil
