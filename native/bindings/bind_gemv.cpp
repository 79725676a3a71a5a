// y = W x with its prologue and epilogue: gemv, gemv_num_tiles, gemv_num_blocks.
#include "bindings.hpp"
#include "edgellm/kernels/gemv.hpp"
#include "kernel_views.hpp"

namespace py = pybind11;

namespace edgellm {
namespace {

using kernels::Epilogue;
using kernels::WeightFormat;

kernels::GemvArgs gemv_args(const py::tuple& weight, const py::object& x, const py::object& out, Epilogue epilogue,
                            const py::object& gain, float norm_eps, const py::object& bias, const py::object& out_bf16,
                            const py::object& block_max, int tile, bool batch_invariant, const py::object& lora,
                            const py::object& x_f32) {
  kernels::GemvArgs args;
  args.weight = WeightTuple(weight).view;
  const std::int64_t rows = args.weight.rows, cols = args.weight.cols;
  const DeviceArray input(x, "x");
  args.x = input.as<const __nv_bfloat16>({-1, cols});
  const std::int64_t tokens = input.size(0);
  if (tokens < 1 || tokens > kernels::kMaxGemvTokens) {
    throw std::invalid_argument("x has " + std::to_string(tokens) + " tokens; 1 to " +
                                std::to_string(kernels::kMaxGemvTokens) + " are allowed");
  }
  args.num_tokens = static_cast<int>(tokens);
  args.x_f32 = optional<const float>(x_f32, "x_f32", {tokens, cols});
  args.epilogue = epilogue;
  args.gain = optional<const __nv_bfloat16>(gain, "gain", {cols});
  args.norm_eps = norm_eps;
  if (args.x_f32 != nullptr && (args.gain == nullptr || args.weight.format != WeightFormat::bf16)) {
    throw std::invalid_argument("x_f32 is given, which only products of a norm with weights in bf16 take");
  }
  args.bias = optional<const float>(bias, "bias", {rows});
  args.tile = tile;
  args.batch_invariant = batch_invariant;
  if (!lora.is_none()) args.lora = lora_view(lora.cast<py::tuple>(), tokens);
  if (tile >= kernels::gemv_num_tiles(args)) throw std::invalid_argument("tile is not below gemv_num_tiles");
  if (kernels::has_pairs(epilogue) || epilogue == Epilogue::store_bf16) {
    args.out_bf16 = required<__nv_bfloat16>(out, "out", {tokens, kernels::has_pairs(epilogue) ? rows / 2 : rows});
  } else {
    args.out_f32 = required<float>(out, "out", {tokens, rows});
  }
  if (epilogue == Epilogue::residual) args.out_bf16 = required<__nv_bfloat16>(out_bf16, "out_bf16", {tokens, rows});
  args.block_max = reinterpret_cast<unsigned long long*>(
      optional<std::int64_t>(block_max, "block_max", {tokens, kernels::gemv_num_blocks(args)}));
  return args;
}

// Of which counts only that they are there.
constexpr float kAnyX = 0.0F;
const __nv_bfloat16 kAnyGain = {};

}  // namespace

void bind_gemv(py::module_& module) {
  py::enum_<Epilogue>(module, "Epilogue")
      .value("store_f32", Epilogue::store_f32)
      .value("store_bf16", Epilogue::store_bf16)
      .value("residual", Epilogue::residual)
      .value("logits", Epilogue::logits)
      .value("swiglu", Epilogue::swiglu)
      .value("geglu", Epilogue::geglu);
  module.def(
      "gemv",
      [](const py::tuple& weight, const py::object& x, const py::object& out, Epilogue epilogue, const py::object& gain,
         float norm_eps, const py::object& bias, const py::object& out_bf16, const py::object& block_max, int tile,
         std::uintptr_t stream, bool pdl, bool batch_invariant, const py::object& lora, const py::object& x_f32) {
        const auto args = gemv_args(weight, x, out, epilogue, gain, norm_eps, bias, out_bf16, block_max, tile,
                                    batch_invariant, lora, x_f32);
        kernels::gemv_async(args, to_stream(stream), pdl);
      },
      py::arg("weight"), py::arg("x"), py::arg("out"), py::arg("epilogue") = Epilogue::store_f32,
      py::arg("gain") = py::none(), py::arg("norm_eps") = 1e-6F, py::arg("bias") = py::none(),
      py::arg("out_bf16") = py::none(), py::arg("block_max") = py::none(), py::arg("tile") = -1, py::arg("stream") = 0,
      py::arg("pdl") = false, py::arg("batch_invariant") = false, py::arg("lora") = py::none(),
      py::arg("x_f32") = py::none());
  const auto shape_only = [](const py::tuple& weight, int num_tokens, Epilogue epilogue, int tile,
                             bool batch_invariant) {
    kernels::GemvArgs args;
    args.weight = WeightTuple(weight).view;
    args.num_tokens = num_tokens;
    args.epilogue = epilogue;
    args.tile = tile;
    args.batch_invariant = batch_invariant;
    return args;
  };
  module.def(
      "gemv_num_tiles",
      [shape_only](const py::tuple& weight, int num_tokens, Epilogue epilogue, bool batch_invariant) {
        return kernels::gemv_num_tiles(shape_only(weight, num_tokens, epilogue, -1, batch_invariant));
      },
      py::arg("weight"), py::arg("num_tokens") = 1, py::arg("epilogue") = Epilogue::store_f32,
      py::arg("batch_invariant") = false);
  module.def(
      "plan_gemv",
      [](WeightFormat format, int rows, int cols, int group, int num_tokens, Epilogue epilogue, bool batch_invariant,
         int tile, int num_sms, std::size_t max_shared_bytes, bool wide, bool normed) {
        kernels::GemvArgs args;
        args.weight.format = format;
        args.weight.rows = rows, args.weight.cols = cols, args.weight.group = group;
        args.num_tokens = num_tokens;
        args.epilogue = epilogue;
        args.batch_invariant = batch_invariant;
        args.tile = tile;
        args.x_f32 = wide ? &kAnyX : nullptr;
        args.gain = normed ? &kAnyGain : nullptr;
        const kernels::GemvPlan plan = kernels::plan_gemv(args, num_sms, max_shared_bytes);
        py::dict result;
        result["family"] = plan.family;
        result["config"] = plan.config;
        result["warps"] = plan.warps;
        result["rows_per_block"] = plan.rows_per_block;
        result["shared_bytes"] = plan.shared_bytes;
        result["num_tiles"] = plan.num_tiles;
        return result;
      },
      py::arg("format"), py::arg("rows"), py::arg("cols"), py::arg("group") = 64, py::arg("num_tokens") = 1,
      py::arg("epilogue") = Epilogue::store_f32, py::arg("batch_invariant") = false, py::arg("tile") = -1,
      py::arg("num_sms") = 132, py::arg("max_shared_bytes") = 227 * 1024, py::arg("wide") = false,
      py::arg("normed") = false, "What would serve a product on a GPU of `num_sms` multiprocessors; needs none.");
  module.def(
      "gemv_num_blocks",
      [shape_only](const py::tuple& weight, int num_tokens, Epilogue epilogue, int tile, bool batch_invariant,
                   bool normed) {
        kernels::GemvArgs args = shape_only(weight, num_tokens, epilogue, tile, batch_invariant);
        args.gain = normed ? &kAnyGain : nullptr;
        return kernels::gemv_num_blocks(args);
      },
      py::arg("weight"), py::arg("num_tokens") = 1, py::arg("epilogue") = Epilogue::logits, py::arg("tile") = -1,
      py::arg("batch_invariant") = false, py::arg("normed") = false);
}

}  // namespace edgellm
