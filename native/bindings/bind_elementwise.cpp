// Small kernels: rms_norm, residual_norm, swiglu, gather_rows, soft_cap.
#include "bindings.hpp"
#include "edgellm/kernels/elementwise.hpp"
#include "edgellm/kernels/input_map.hpp"
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
        args.bias = optional<const float>(bias, "bias", {hidden});
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
        args.bias = optional<const float>(bias, "bias", {2 * width});
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
  module.def(
      "map_input",
      [](const py::object& x, const py::object& out, const py::object& order, const py::object& factor,
         std::uintptr_t stream) {
        const DeviceArray to(out, "out");
        const std::int64_t tokens = to.size(0), cols = to.size(1);
        if (cols % 8 != 0) to.fail("has a width that is no multiple of 8");
        kernels::InputMapArgs args;
        args.x = required<const __nv_bfloat16>(x, "x", {tokens, cols});
        args.out = to.as<__nv_bfloat16>({tokens, cols});
        args.order = optional<const std::int32_t>(order, "order", {cols});
        args.factor = optional<const float>(factor, "factor", {cols});
        args.num_tokens = static_cast<int>(tokens);
        args.cols = static_cast<int>(cols);
        kernels::map_input_async(args, to_stream(stream), false);
      },
      py::arg("x"), py::arg("out"), py::arg("order") = py::none(), py::arg("factor") = py::none(),
      py::arg("stream") = 0, "out[t, j] = x[t, order[j]] * factor[j].");
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
  module.def(
      "soft_cap",
      [](const py::object& x, float cap, std::uintptr_t stream) {
        if (!(cap > 0.0F)) throw std::invalid_argument("cap is " + std::to_string(cap) + "; it must be positive");
        const DeviceArray to(x, "x");
        const std::int64_t rows = to.size(0), width = to.size(1);
        kernels::soft_cap_async(to.as<float>({rows, width}), static_cast<std::size_t>(rows * width), cap,
                                to_stream(stream), false);
      },
      py::arg("x"), py::arg("cap"), py::arg("stream") = 0);
}

}  // namespace edgellm
