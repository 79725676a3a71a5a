// Prefill's small kernels: rms_norm, residual_norm, swiglu, gather_rows.
#include "bindings.hpp"
#include "edgellm/kernels/elementwise.hpp"
#include "kernel_views.hpp"

namespace py = pybind11;

namespace edgellm {

void bind_elementwise(py::module_& module) {
  module.def(
      "rms_norm",
      [](const py::object& x, const py::object& gain, float eps, const py::object& out, std::uintptr_t stream) {
        const DeviceArray input(x, "x");
        const std::int64_t tokens = input.size(0), hidden = input.size(1);
        kernels::rms_norm_async(input.as<const float>({tokens, hidden}),
                                required<const __nv_bfloat16>(gain, "gain", {hidden}), eps, static_cast<int>(tokens),
                                static_cast<int>(hidden), required<__nv_bfloat16>(out, "out", {tokens, hidden}),
                                to_stream(stream), false);
      },
      py::arg("x"), py::arg("gain"), py::arg("eps"), py::arg("out"), py::arg("stream") = 0);
  module.def(
      "residual_norm",
      [](const py::object& delta, const py::object& residual, const py::object& bias, const py::object& residual_bf16,
         const py::object& gain, float eps, const py::object& normed, std::uintptr_t stream) {
        const DeviceArray input(delta, "delta");
        const std::int64_t tokens = input.size(0), hidden = input.size(1);
        if (hidden % 2 != 0) input.fail("has an odd width");
        kernels::ResidualNormArgs args;
        args.delta = input.as<const __nv_bfloat16>({tokens, hidden});
        args.bias = optional<const float>(bias, "bias", {hidden});
        args.residual = required<float>(residual, "residual", {tokens, hidden});
        args.residual_bf16 = optional<__nv_bfloat16>(residual_bf16, "residual_bf16", {tokens, hidden});
        args.gain = optional<const __nv_bfloat16>(gain, "gain", {hidden});
        args.eps = eps;
        if (args.gain) args.normed = required<__nv_bfloat16>(normed, "normed", {tokens, hidden});
        args.num_tokens = static_cast<int>(tokens);
        args.hidden = static_cast<int>(hidden);
        kernels::residual_norm_async(args, to_stream(stream), false);
      },
      py::arg("delta"), py::arg("residual"), py::arg("bias") = py::none(), py::arg("residual_bf16") = py::none(),
      py::arg("gain") = py::none(), py::arg("eps") = 1e-6F, py::arg("normed") = py::none(), py::arg("stream") = 0);
  module.def(
      "swiglu",
      [](const py::object& gate_up, const py::object& out, const py::object& bias, std::uintptr_t stream) {
        const DeviceArray to(out, "out");
        const std::int64_t tokens = to.size(0), width = to.size(1);
        if (width % 8 != 0) to.fail("has a width that is no multiple of 8");
        kernels::swiglu_async(required<const __nv_bfloat16>(gate_up, "gate_up", {tokens, 2 * width}),
                              optional<const float>(bias, "bias", {2 * width}), static_cast<int>(tokens),
                              static_cast<int>(width), to.as<__nv_bfloat16>({tokens, width}), to_stream(stream), false);
      },
      py::arg("gate_up"), py::arg("out"), py::arg("bias") = py::none(), py::arg("stream") = 0);
  module.def(
      "gather_rows",
      [](const py::object& x, const py::object& rows, const py::object& out, std::uintptr_t stream) {
        const DeviceArray to(out, "out");
        const std::int64_t count = to.size(0), hidden = to.size(1);
        if (hidden % 8 != 0) to.fail("has a width that is no multiple of 8");
        kernels::gather_rows_async(required<const __nv_bfloat16>(x, "x", {-1, hidden}),
                                   required<const std::int32_t>(rows, "rows", {count}), static_cast<int>(count),
                                   static_cast<int>(hidden), to.as<__nv_bfloat16>({count, hidden}), to_stream(stream),
                                   false);
      },
      py::arg("x"), py::arg("rows"), py::arg("out"), py::arg("stream") = 0);
}

}  // namespace edgellm
