// Python bindings, the only file that uses pybind11. Arguments are addresses and sizes; the callers in amil_fast/ops
// have checked shapes, dtypes, devices and strides. All operators release the GIL.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <tuple>
#include <utility>
#include <vector>

#include "adjust_pool/adjust_pool.h"
#include "build_info.h"
#include "decode_heatmaps/decode_heatmaps.h"
#include "runtime/instruction_set.h"
#include "runtime/page_cache.h"

namespace py = pybind11;

namespace {

template <class T>
T* pointer(uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

amil::Bags make_bags(uintptr_t instances, int dtype, int64_t B, int64_t N, int64_t D, int64_t bag_stride,
                     int64_t row_stride, uintptr_t offsets, uintptr_t lengths, uintptr_t mask, int T, int num_threads) {
    return {pointer<const void>(instances),
            static_cast<amil::Dtype>(dtype),
            B,
            N,
            D,
            bag_stride,
            row_stride,
            pointer<const int64_t>(offsets),
            pointer<const int64_t>(lengths),
            pointer<const uint8_t>(mask),
            T,
            num_threads};
}

// Both take the arguments of make_bags, followed by the addresses of the remaining tensors.
void adjust_pool_forward(uintptr_t instances, int dtype, int64_t B, int64_t N, int64_t D, int64_t bag_stride,
                         int64_t row_stride, uintptr_t offsets, uintptr_t lengths, uintptr_t mask, int T,
                         int num_threads, uintptr_t bag, uintptr_t weights, uintptr_t sigma, uintptr_t softmax_stats) {
    const py::gil_scoped_release release;
    const amil::Bags bags =
        make_bags(instances, dtype, B, N, D, bag_stride, row_stride, offsets, lengths, mask, T, num_threads);
    amil::adjust_pool_forward(
        bags, {pointer<void>(bag), pointer<void>(weights), pointer<void>(sigma), pointer<void>(softmax_stats)});
}

void adjust_pool_backward(uintptr_t instances, int dtype, int64_t B, int64_t N, int64_t D, int64_t bag_stride,
                          int64_t row_stride, uintptr_t offsets, uintptr_t lengths, uintptr_t mask, int T,
                          int num_threads, uintptr_t grad_bag, uintptr_t grad_weights, uintptr_t sigma,
                          uintptr_t softmax_stats, bool detach_routing, uintptr_t grad_instances) {
    const py::gil_scoped_release release;
    const amil::Bags bags =
        make_bags(instances, dtype, B, N, D, bag_stride, row_stride, offsets, lengths, mask, T, num_threads);
    amil::adjust_pool_backward(
        bags, {pointer<const void>(grad_bag), pointer<const void>(grad_weights), pointer<const void>(sigma),
               pointer<const void>(softmax_stats), detach_routing, pointer<void>(grad_instances)});
}

// A DecodeCall together with the array that its `swap` refers to; `DecodeCall` in Python.
struct OwningDecodeCall {
    std::vector<int64_t> swap;
    amil::DecodeCall call;
};

using Sizes = std::array<int64_t, 4>;

OwningDecodeCall make_decode_call(uintptr_t heatmaps, Sizes strides, uintptr_t flipped, Sizes flipped_strides,
                                  std::vector<int64_t> swap, bool shift_flipped, int dtype, Sizes shape, int refine,
                                  int convention, int blur_kernel, uintptr_t center, uintptr_t scale, uintptr_t affine,
                                  uintptr_t coords, uintptr_t scores) {
    OwningDecodeCall owner{std::move(swap), {}};
    amil::DecodeCall& call = owner.call;
    call.heatmaps = pointer<const void>(heatmaps);
    std::tie(call.stride_b, call.stride_k, call.stride_y, call.stride_x) = std::tuple_cat(strides);
    call.flipped = pointer<const void>(flipped);
    std::tie(call.flipped_stride_b, call.flipped_stride_k, call.flipped_stride_y, call.flipped_stride_x) =
        std::tuple_cat(flipped_strides);
    call.swap = owner.swap.data();  // remains valid when the vector is moved
    call.shift_flipped = shift_flipped;
    call.dtype = static_cast<amil::Dtype>(dtype);
    call.B = shape[0];
    call.K = shape[1];
    call.H = static_cast<int>(shape[2]);
    call.W = static_cast<int>(shape[3]);
    call.refine = static_cast<amil::Refine>(refine);
    call.convention = static_cast<amil::Convention>(convention);
    call.blur_kernel = blur_kernel;
    call.center = pointer<const float>(center);
    call.scale = pointer<const float>(scale);
    call.affine = pointer<const float>(affine);
    call.coords = pointer<float>(coords);
    call.scores = pointer<float>(scores);
    return owner;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
    m.doc() = "Compiled backends of amil_fast; use them through amil_fast.ops.";
    m.attr("build_info") = AMIL_BUILD_INFO;
    m.attr("with_cuda") = static_cast<bool>(AMIL_WITH_CUDA);
    m.def("usable_instruction_sets", &amil::usable_instruction_sets);
    m.def("instruction_set", &amil::instruction_set_name);
    m.def("set_instruction_set", &amil::set_instruction_set, py::arg("name"));

    py::class_<amil::PageBlock>(m, "PageBlock", py::buffer_protocol())
        .def(py::init<size_t>(), py::arg("bytes"))
        .def_buffer([](amil::PageBlock& block) {
            return py::buffer_info(block.data(), 1, py::format_descriptor<uint8_t>::format(), block.size());
        });
    m.def("adjust_pool_forward", &adjust_pool_forward);
    m.def("adjust_pool_backward", &adjust_pool_backward);

    py::class_<OwningDecodeCall>(m, "DecodeCall").def(py::init(&make_decode_call));
    m.def("decode_heatmaps_cpu", [](const OwningDecodeCall& owner, int num_threads) {
        py::gil_scoped_release release;
        amil::decode_heatmaps_cpu(owner.call, num_threads);
    });
#if AMIL_WITH_CUDA
    m.def("decode_heatmaps_cuda", [](const OwningDecodeCall& owner, int device, uintptr_t stream) {
        py::gil_scoped_release release;
        amil::decode_heatmaps_cuda(owner.call, device, pointer<void>(stream));
    });
#endif
    m.def("blur_weights", [](int blur_kernel) {
        const amil::BlurWeights blur = amil::blur_weights(blur_kernel);
        return std::vector<double>(blur.weights, blur.weights + blur.radius + 1);
    });
}
