// rms_norm, residual_norm.
#include "bindings.hpp"
#include "edgellm/kernels/rms_norm.hpp"
#include "kernel_views.hpp"

namespace py = pybind11;

namespace edgellm {

void bind_rms_norm(py::module_& module) {
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
         const py::object& gain, float eps, const py::object& normed, std::uintptr_t stream,
         const py::object& row_scales, const py::object& column_scales, const py::object& normed_fp8,
         const py::object& normed_scales, const py::object& delta_gain) {
        const DeviceArray input(delta, "delta");
        const std::int64_t tokens = input.size(0), hidden = input.size(1);
        if (hidden % 8 != 0) input.fail("has a width that is no multiple of 8");
        kernels::ResidualNormArgs args;
        args.delta_gain = optional<const __nv_bfloat16>(delta_gain, "delta_gain", {hidden});
        if (args.delta_gain && !input.is_bfloat()) {
          args.delta_f32 = input.as<const float>({tokens, hidden});
        } else {
          args.delta = input.as<const __nv_bfloat16>({tokens, hidden});
        }
        args.bias = features(bias, "bias", hidden);
        args.residual = required<float>(residual, "residual", {tokens, hidden});
        args.residual_bf16 = optional<__nv_bfloat16>(residual_bf16, "residual_bf16", {tokens, hidden});
        args.gain = optional<const __nv_bfloat16>(gain, "gain", {hidden});
        args.eps = eps;
        args.scales = product_scales(row_scales, column_scales, tokens, hidden);
        if (args.gain && normed_fp8.is_none()) {
          args.normed = required<__nv_bfloat16>(normed, "normed", {tokens, hidden});
        } else if (args.gain) {
          args.normed = optional<__nv_bfloat16>(normed, "normed", {tokens, hidden});
          args.normed_fp8 = required<std::uint8_t>(normed_fp8, "normed_fp8", {tokens, hidden});
          args.normed_scales = required<float>(normed_scales, "normed_scales", {tokens});
        }
        args.num_tokens = static_cast<int>(tokens);
        args.hidden = static_cast<int>(hidden);
        kernels::residual_norm_async(args, to_stream(stream), false);
      },
      py::arg("delta"), py::arg("residual"), py::arg("bias") = py::none(), py::arg("residual_bf16") = py::none(),
      py::arg("gain") = py::none(), py::arg("eps") = 1e-6F, py::arg("normed") = py::none(), py::arg("stream") = 0,
      py::arg("row_scales") = py::none(), py::arg("column_scales") = py::none(), py::arg("normed_fp8") = py::none(),
      py::arg("normed_scales") = py::none(), py::arg("delta_gain") = py::none());
}

}  // namespace edgellm
