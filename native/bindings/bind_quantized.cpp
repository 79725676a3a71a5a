// Weight layouts and formats: repack_int4, dequantize, convert_to_bf16, quantize_fp8.
#include "bindings.hpp"
#include "edgellm/kernels/quantized.hpp"
#include "kernel_views.hpp"

namespace py = pybind11;

namespace edgellm {

void bind_quantized(py::module_& module) {
  module.def("int4_packed_data_bytes", &kernels::int4_packed_data_bytes, py::arg("rows"), py::arg("cols"));
  module.def(
      "int4_packed_scales_bytes",
      [](int rows, int cols, int group) {
        check_group(group, cols);
        return kernels::int4_packed_scales_bytes(rows, cols, group);
      },
      py::arg("rows"), py::arg("cols"), py::arg("group"));
  module.def(
      "repack_int4",
      [](const py::object& data, const py::object& scales, int group, bool gate_up, const py::object& packed_data,
         const py::object& packed_scales, std::uintptr_t stream) {
        const DeviceArray from(data, "data");
        const std::int64_t rows = from.size(0), cols = from.size(1) * 2;
        check_group(group, cols);
        const auto data_bytes =
            static_cast<std::int64_t>(kernels::int4_packed_data_bytes(static_cast<int>(rows), static_cast<int>(cols)));
        const auto scale_bytes = static_cast<std::int64_t>(
            kernels::int4_packed_scales_bytes(static_cast<int>(rows), static_cast<int>(cols), group));
        kernels::repack_int4_async(
            from.as<const std::uint8_t>({rows, cols / 2}),
            required<const __half>(scales, "scales", {rows, cols / group}), static_cast<int>(rows),
            static_cast<int>(cols), group, gate_up, required<std::uint8_t>(packed_data, "packed_data", {data_bytes}),
            required<std::uint8_t>(packed_scales, "packed_scales", {scale_bytes}), to_stream(stream));
      },
      py::arg("data"), py::arg("scales"), py::arg("group"), py::arg("gate_up"), py::arg("packed_data"),
      py::arg("packed_scales"), py::arg("stream") = 0);
  module.def(
      "dequantize",
      [](const py::tuple& weight, bool gate_up, int first_row, const py::object& out, std::uintptr_t stream) {
        const kernels::WeightView view = WeightTuple(weight).view;
        const DeviceArray to(out, "out");
        auto* data = to.as<__nv_bfloat16>({-1, view.cols});
        if (first_row < 0 || first_row + to.size(0) > view.rows) to.fail("has rows past the weight's");
        kernels::dequantize_async(view, gate_up, first_row, static_cast<int>(to.size(0)), data, to_stream(stream),
                                  false);
      },
      py::arg("weight"), py::arg("gate_up"), py::arg("first_row"), py::arg("out"), py::arg("stream") = 0);
  module.def(
      "convert_to_bf16",
      [](const py::object& values, const py::object& out, std::uintptr_t stream) {
        const DeviceArray from(values, "values");
        const std::int64_t count = from.size(0);
        auto* to = required<__nv_bfloat16>(out, "out", {count});
        if (from.bits() == 16) {
          kernels::convert_to_bf16_async(from.as<const __half>({count}), to, static_cast<std::size_t>(count),
                                         to_stream(stream));
        } else {
          kernels::convert_to_bf16_async(from.as<const float>({count}), to, static_cast<std::size_t>(count),
                                         to_stream(stream));
        }
      },
      py::arg("values"), py::arg("out"), py::arg("stream") = 0);
  module.def(
      "quantize_fp8",
      [](const py::object& weight, const py::object& out, const py::object& scales, std::uintptr_t stream) {
        const DeviceArray from(weight, "weight");
        const std::int64_t rows = from.size(0), cols = from.size(1);
        if (cols % 8 != 0) from.fail("has a width that is no multiple of 8");
        kernels::quantize_fp8_async(from.as<const __nv_bfloat16>({rows, cols}), static_cast<int>(rows),
                                    static_cast<int>(cols), required<std::uint8_t>(out, "out", {rows, cols}),
                                    required<float>(scales, "scales", {rows}), to_stream(stream), false);
      },
      py::arg("weight"), py::arg("out"), py::arg("scales"), py::arg("stream") = 0);
}

}  // namespace edgellm
