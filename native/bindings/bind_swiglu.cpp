// swiglu.
#include "bindings.hpp"
#include "edgellm/kernels/swiglu.hpp"
#include "kernel_views.hpp"

namespace py = pybind11;

namespace edgellm {

void bind_swiglu(py::module_& module) {
  module.def(
      "swiglu",
      [](const py::object& gate_up, const py::object& out, const py::object& bias, std::uintptr_t stream,
         const py::object& row_scales, const py::object& column_scales, const py::object& out_scales,
         kernels::Activation activation) {
        const DeviceArray to(out, "out");
        const std::int64_t tokens = to.size(0), width = to.size(1);
        if (width % 8 != 0) to.fail("has a width that is no multiple of 8");
        kernels::SwigluArgs args;
        args.gate_up = required<const __nv_bfloat16>(gate_up, "gate_up", {tokens, 2 * width});
        args.scales = product_scales(row_scales, column_scales, tokens, 2 * width);
        args.bias = features(bias, "bias", 2 * width);
        if (to.is_bfloat()) {
          args.out = to.as<__nv_bfloat16>({tokens, width});
        } else {
          if (width > kernels::kMaxFp8Width) to.fail("is too wide for FP8");
          args.out_fp8 = to.as<std::uint8_t>({tokens, width});
          args.out_scales = required<float>(out_scales, "out_scales", {tokens});
        }
        args.num_tokens = static_cast<int>(tokens);
        args.width = static_cast<int>(width);
        args.activation = activation;
        kernels::swiglu_async(args, to_stream(stream), false);
      },
      py::arg("gate_up"), py::arg("out"), py::arg("bias") = py::none(), py::arg("stream") = 0,
      py::arg("row_scales") = py::none(), py::arg("column_scales") = py::none(), py::arg("out_scales") = py::none(),
      py::arg("activation") = kernels::Activation::silu);
}

}  // namespace edgellm
