// LoRA: lora_linear makes an entry of the table that lora_down and gemv read, and that lora_prefill takes itself.
#include <pybind11/stl.h>

#include <cstring>
#include <string_view>
#include <vector>

#include "bindings.hpp"
#include "edgellm/kernels/lora.hpp"
#include "kernel_views.hpp"

namespace py = pybind11;

namespace edgellm {
namespace {

using kernels::LoraLinear;

// rows: of each target; ranks: of each target, multiples of 8. The bytes hold pointers: a and b must outlive their use.
py::bytes lora_linear(const py::object& a, const py::object& b, const std::vector<int>& rows,
                      const std::vector<int>& ranks) {
  if (rows.empty() || rows.size() > kernels::kMaxLoraTargets || ranks.size() != rows.size()) {
    throw std::invalid_argument("a layer has 1 to 3 targets, each with rows and a rank");
  }
  LoraLinear linear;
  std::int32_t first_row = 0;
  for (std::size_t i = 0; i < rows.size(); ++i) {
    if (rows[i] < 1 || ranks[i] < 0 || ranks[i] > kernels::kMaxLoraRank || ranks[i] % kernels::kLoraAlign != 0) {
      throw std::invalid_argument("rows must be at least 1, and ranks multiples of 8 up to 64");
    }
    if (i > 0) {
      linear.first_row[i - 1] = first_row;
      linear.first_b[i - 1] = linear.num_b;
    }
    linear.rank[i] = static_cast<std::uint8_t>(ranks[i]);
    linear.first_h[i] = static_cast<std::uint8_t>(linear.num_a_rows);
    linear.num_a_rows += ranks[i];
    linear.num_b += rows[i] * ranks[i];
    first_row += rows[i];
  }
  linear.a = required<const __nv_bfloat16>(a, "a", {linear.num_a_rows, -1});
  linear.b = required<const __nv_bfloat16>(b, "b", {linear.num_b});
  return {reinterpret_cast<const char*>(&linear), sizeof(linear)};
}

kernels::LoraPrefillArgs prefill_args(const py::bytes& linear, const std::vector<int>& rows, const py::object& x,
                                      const py::object& h, const py::object& y) {
  kernels::LoraPrefillArgs args;
  const std::string_view bytes = linear;
  if (bytes.size() != sizeof(LoraLinear) || rows.empty() || rows.size() > kernels::kMaxLoraTargets) {
    throw std::invalid_argument("linear is what lora_linear made of these rows, one to three");
  }
  std::memcpy(&args.linear, bytes.data(), sizeof(LoraLinear));
  args.num_targets = static_cast<int>(rows.size());
  for (std::size_t i = 0; i < rows.size(); ++i) {
    if (rows[i] < 1 || rows[i] % 8 != 0) throw std::invalid_argument("rows must be multiples of 8");
    args.first_rows[i + 1] = args.first_rows[i] + rows[i];
  }
  args.rows = args.first_rows[rows.size()];
  const DeviceArray input(x, "x");
  args.x = input.as<const __nv_bfloat16>({-1, -1});
  args.num_tokens = static_cast<int>(input.size(0));
  args.cols = static_cast<int>(input.size(1));
  if (args.cols % 16 != 0) input.fail("must have a multiple of 16 columns");
  args.h = required<__nv_bfloat16>(h, "h", {args.num_tokens, args.linear.num_a_rows});
  args.y = required<__nv_bfloat16>(y, "y", {args.num_tokens, args.rows});
  return args;
}

}  // namespace

void bind_lora(py::module_& module) {
  module.def("lora_linear", &lora_linear, py::arg("a"), py::arg("b"), py::arg("rows"), py::arg("ranks"));
  module.def(
      "lora_down",
      [](const py::tuple& lora, const py::object& x, const py::object& gain, float norm_eps, std::uintptr_t stream,
         bool pdl) {
        kernels::LoraDownArgs args;
        const DeviceArray input(x, "x");
        args.x = input.as<const __nv_bfloat16>({-1, -1});
        if (input.size(1) % kernels::kLoraAlign != 0) input.fail("must have a multiple of 8 columns");
        args.num_tokens = static_cast<int>(input.size(0));
        args.cols = static_cast<int>(input.size(1));
        args.lora = lora_view(lora, args.num_tokens);
        args.gain = optional<const __nv_bfloat16>(gain, "gain", {args.cols});
        args.norm_eps = norm_eps;
        kernels::lora_down_async(args, to_stream(stream), pdl);
      },
      py::arg("lora"), py::arg("x"), py::arg("gain") = py::none(), py::arg("norm_eps") = 1e-6F, py::arg("stream") = 0,
      py::arg("pdl") = false);
  module.def(
      "lora_prefill",
      [](const py::bytes& linear, const std::vector<int>& rows, const py::object& x, const py::object& h,
         const py::object& y, std::uintptr_t stream,
         bool pdl) { kernels::lora_prefill_async(prefill_args(linear, rows, x, h, y), to_stream(stream), pdl); },
      py::arg("linear"), py::arg("rows"), py::arg("x"), py::arg("h"), py::arg("y"), py::arg("stream") = 0,
      py::arg("pdl") = false);
}

}  // namespace edgellm
