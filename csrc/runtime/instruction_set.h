// Selects between the copies of csrc/*/simd that are compiled for different instruction sets.
#pragma once

#include <string>
#include <vector>

namespace amil {

enum class InstructionSet { baseline = 0, avx2 = 1, avx512 = 2 };

// The instruction sets that the processor supports, slowest first.
std::vector<std::string> usable_instruction_sets();

// The instruction set in use: by default the fastest supported one.
InstructionSet instruction_set();
std::string instruction_set_name();

// Changes the instruction set in use, for tests and benchmarks. Throws std::invalid_argument if the processor does not
// support it.
void set_instruction_set(const std::string& name);

}  // namespace amil
