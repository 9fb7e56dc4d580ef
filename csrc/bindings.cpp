// The Python face of csrc/, and the only file that knows pybind11. Arguments are addresses and sizes: the callers in
// amil_fast/ops have checked shapes, dtypes, devices and strides. Every function releases the GIL while it works.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "build_info.h"
#include "instruction_set.h"

namespace py = pybind11;

PYBIND11_MODULE(_C, m) {
    m.doc() = "Compiled part of amil_fast; use it through amil_fast.ops.";
    m.attr("build_info") = AMIL_BUILD_INFO;
    m.attr("with_cuda") = static_cast<bool>(AMIL_WITH_CUDA);
    m.def("usable_instruction_sets", &amil::usable_instruction_sets);
    m.def("instruction_set", &amil::instruction_set_name);
    m.def("set_instruction_set", &amil::set_instruction_set, py::arg("name"));
}
