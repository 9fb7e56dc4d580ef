// Element types of tensors, with the codes that the Python side uses (amil_fast/ops).
#pragma once

namespace amil {

enum class Dtype { float32 = 0, float64 = 1, float16 = 2, bfloat16 = 3 };

inline int size_of(Dtype dtype) { return dtype == Dtype::float64 ? 8 : dtype == Dtype::float32 ? 4 : 2; }

}  // namespace amil
