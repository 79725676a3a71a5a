// The next token on the device: greedy, sample.
#include "bindings.hpp"
#include "edgellm/kernels/sampling.hpp"
#include "kernel_views.hpp"

namespace py = pybind11;

namespace edgellm {
namespace {

// (token_ids, positions, history, step_counts) of int32, and maybe row_tokens, which the logits have `vocab` of.
kernels::DecodeState decode_state(const py::tuple& t, std::int64_t batch, std::int64_t vocab) {
  if (t.size() != 4 && t.size() != 5) {
    throw std::invalid_argument("the state is (token_ids, positions, history, step_counts[, row_tokens])");
  }
  kernels::DecodeState state;
  state.token_ids = required<std::int32_t>(t[0], "token_ids", {batch});
  state.positions = required<std::int32_t>(t[1], "positions", {batch});
  const DeviceArray history(t[2], "history");
  state.history = history.as<std::int32_t>({batch, -1});
  state.history_length = static_cast<int>(history.size(1));
  state.step_counts = required<std::int32_t>(t[3], "step_counts", {batch});
  if (t.size() == 5) state.row_tokens = required<const std::int32_t>(t[4], "row_tokens", {vocab});
  return state;
}

template <class Args>
void set_embedding(Args& args, kernels::WeightView& view, const py::object& table, float scale,
                   const py::object& residual, const py::object& residual_bf16) {
  if (table.is_none()) return;
  view = WeightTuple(table.cast<py::tuple>()).view;
  args.table = &view;
  args.embed_scale = scale;
  args.residual = required<float>(residual, "residual", {args.batch, view.cols});
  args.residual_bf16 = required<__nv_bfloat16>(residual_bf16, "residual_bf16", {args.batch, view.cols});
}

}  // namespace

void bind_sampling(py::module_& module) {
  module.attr("SAMPLING_ROW_BYTES") = sizeof(kernels::SamplingRow);
  module.def(
      "count_tokens",
      [](const py::object& ids, int num_prompt, const py::object& counts, std::uintptr_t stream) {
        const DeviceArray input(ids, "ids");
        const auto num_ids = static_cast<int>(input.size(0));
        if (num_prompt < 0 || num_prompt > num_ids) throw std::invalid_argument("num_prompt exceeds the ids");
        kernels::count_tokens_async(input.as<const std::int32_t>({num_ids}), num_prompt, num_ids - num_prompt,
                                    required<std::uint32_t>(counts, "counts", {-1}), to_stream(stream), false);
      },
      py::arg("ids"), py::arg("num_prompt"), py::arg("counts"), py::arg("stream") = 0,
      "Add ids, the first num_prompt of them of a prompt, to one sequence's counts (vocab); all must be below vocab.");
  module.def(
      "greedy",
      [](const py::object& block_max, const py::tuple& state, const py::object& table, const py::object& residual,
         const py::object& residual_bf16, float embed_scale, std::uintptr_t stream, bool pdl) {
        const DeviceArray keys(block_max, "block_max");
        kernels::GreedyArgs args;
        args.batch = static_cast<int>(keys.size(0));
        args.num_blocks = static_cast<int>(keys.size(1));
        args.block_max = reinterpret_cast<const unsigned long long*>(keys.as<const std::int64_t>({-1, -1}));
        args.state = decode_state(state, args.batch, -1);
        kernels::WeightView view;
        set_embedding(args, view, table, embed_scale, residual, residual_bf16);
        kernels::greedy_async(args, to_stream(stream), pdl);
      },
      py::arg("block_max"), py::arg("state"), py::arg("table") = py::none(), py::arg("residual") = py::none(),
      py::arg("residual_bf16") = py::none(), py::arg("embed_scale") = 1.0F, py::arg("stream") = 0,
      py::arg("pdl") = false);
  module.def(
      "sample",
      [](const py::object& logits, const py::object& scores, const py::object& rows, const py::tuple& state,
         const py::object& counts, const py::object& bias_ids, const py::object& bias_values,
         const py::object& token_mask, const py::object& logprobs, const py::object& table, const py::object& residual,
         const py::object& residual_bf16, float embed_scale, std::uintptr_t stream, bool pdl) {
        const DeviceArray input(logits, "logits");
        const std::int64_t batch = input.size(0), vocab = input.size(1);
        kernels::SamplingArgs args;
        args.batch = static_cast<int>(batch);
        args.vocab = static_cast<int>(vocab);
        args.logits = input.as<float>({batch, vocab});
        args.scores = required<float>(scores, "scores", {batch, vocab});
        args.rows = reinterpret_cast<kernels::SamplingRow*>(
            required<std::uint8_t>(rows, "rows", {batch, static_cast<std::int64_t>(sizeof(kernels::SamplingRow))}));
        args.state = decode_state(state, batch, vocab);
        args.counts = optional<std::uint32_t>(counts, "counts", {batch, vocab});
        if (!bias_ids.is_none()) {
          const DeviceArray ids(bias_ids, "bias_ids");
          args.max_bias = static_cast<int>(ids.size(1));
          args.bias_ids = ids.as<const std::int32_t>({batch, -1});
          args.bias_values = required<const float>(bias_values, "bias_values", {batch, ids.size(1)});
        }
        args.token_mask = optional<const std::uint32_t>(token_mask, "token_mask", {batch, (vocab + 31) / 32});
        constexpr auto kLogprobWords = static_cast<std::int64_t>(sizeof(kernels::TokenLogprobs) / sizeof(std::int32_t));
        args.logprobs = reinterpret_cast<kernels::TokenLogprobs*>(
            optional<std::int32_t>(logprobs, "logprobs", {batch, args.state.history_length, kLogprobWords}));
        kernels::WeightView view;
        set_embedding(args, view, table, embed_scale, residual, residual_bf16);
        kernels::sample_async(args, to_stream(stream), pdl);
      },
      py::arg("logits"), py::arg("scores"), py::arg("rows"), py::arg("state"), py::arg("counts") = py::none(),
      py::arg("bias_ids") = py::none(), py::arg("bias_values") = py::none(), py::arg("token_mask") = py::none(),
      py::arg("logprobs") = py::none(), py::arg("table") = py::none(), py::arg("residual") = py::none(),
      py::arg("residual_bf16") = py::none(), py::arg("embed_scale") = 1.0F, py::arg("stream") = 0,
      py::arg("pdl") = false);
}

}  // namespace edgellm
