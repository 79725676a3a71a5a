// What a TensorRT engine reads of a step: engine_rows, engine_chunk, engine_mask.
#include "bindings.hpp"
#include "edgellm/kernels/engine_inputs.hpp"
#include "kernel_views.hpp"

namespace py = pybind11;

namespace edgellm {
namespace {

struct HalfArray {
  void* data = nullptr;
  bool is_bf16 = false;
};

// fp16 or bf16.
HalfArray half_array(const py::object& object, const char* name, const std::vector<std::int64_t>& shape) {
  const DeviceArray array(object, name);
  if (array.is_bfloat()) return {array.as<__nv_bfloat16>(shape), true};
  return {array.as<__half>(shape), false};
}

// (embeds, positions, write_indices, logit_indices) and maybe tree_masks, of `rows` rows.
kernels::EngineInputs engine_inputs(const py::tuple& t, std::int64_t rows, std::int64_t hidden,
                                    std::int64_t sequences) {
  if (t.size() != 4 && t.size() != 5) {
    throw std::invalid_argument("out is (embeds, positions, write_indices, logit_indices[, tree_masks])");
  }
  kernels::EngineInputs out;
  const HalfArray embeds = half_array(t[0], "embeds", {rows, hidden});
  out.embeds = embeds.data;
  out.is_bf16 = embeds.is_bf16;
  out.positions = required<std::int64_t>(t[1], "positions", {rows});
  out.write_indices = required<std::int64_t>(t[2], "write_indices", {sequences});
  out.logit_indices = required<std::int64_t>(t[3], "logit_indices", {-1});
  if (t.size() == 5) out.tree_masks = required<std::int64_t>(t[4], "tree_masks", {rows});
  return out;
}

void engine_rows(const py::object& residual, const py::object& positions, const py::object& slots,
                 std::uint32_t members, int first_slot, int num_rows, int idle_place, const py::tuple& out,
                 std::uintptr_t stream) {
  const DeviceArray input(residual, "residual");
  const std::int64_t batch = input.size(0), hidden = input.size(1);
  if (batch > 32) input.fail("has more than 32 sequences");
  kernels::EngineRowsArgs args;
  args.residual = input.as<const float>({batch, hidden});
  args.positions = required<const std::int32_t>(positions, "positions", {batch});
  args.slots = required<const std::int32_t>(slots, "slots", {batch});
  args.batch = static_cast<int>(batch);
  args.members = members;
  args.hidden = static_cast<int>(hidden);
  args.first_slot = first_slot;
  args.num_rows = num_rows;
  args.idle_place = idle_place;
  args.out = engine_inputs(out, num_rows, hidden, num_rows);
  kernels::engine_rows_async(args, to_stream(stream));
}

void engine_chunk(const py::object& residual, int position, int num_logits, const py::tuple& out,
                  const py::object& depths, const py::object& masks, const py::object& start, std::uintptr_t stream) {
  const DeviceArray input(residual, "residual");
  const std::int64_t tokens = input.size(0), hidden = input.size(1);
  if (num_logits < 1 || num_logits > tokens) throw std::invalid_argument("num_logits must be 1 to the tokens");
  kernels::EngineChunkArgs args;
  args.residual = input.as<const float>({tokens, hidden});
  args.num_tokens = static_cast<int>(tokens);
  args.hidden = static_cast<int>(hidden);
  args.position = position;
  args.num_logits = num_logits;
  args.depths = optional<const std::int32_t>(depths, "depths", {tokens});
  args.masks = optional<const std::uint64_t>(masks, "masks", {tokens});
  args.start = optional<const std::int32_t>(start, "start", {1});
  args.out = engine_inputs(out, tokens, hidden, 1);
  kernels::engine_chunk_async(args, to_stream(stream));
}

void engine_mask(const py::object& positions, const py::object& mask, int window, const py::object& tree, int prefix,
                 const py::object& start, std::uintptr_t stream) {
  const DeviceArray input(positions, "positions");
  const std::int64_t tokens = input.size(0);
  kernels::EngineMaskArgs args;
  args.positions = input.as<const std::int64_t>({tokens});
  args.num_tokens = static_cast<int>(tokens);
  args.tree = optional<const std::uint64_t>(tree, "tree", {tokens});
  if (args.tree != nullptr && tokens > 64) input.fail("has more than 64 nodes of a tree");
  const HalfArray to = half_array(mask, "mask", {tokens, -1});
  args.capacity = static_cast<int>(DeviceArray(mask, "mask").size(1));
  args.window = window;
  args.prefix = prefix;
  args.start = optional<const std::int32_t>(start, "start", {1});
  args.mask = to.data;
  args.is_bf16 = to.is_bf16;
  kernels::engine_mask_async(args, to_stream(stream));
}

}  // namespace

void bind_engine_inputs(py::module_& module) {
  module.def("engine_rows", &engine_rows, py::arg("residual"), py::arg("positions"), py::arg("slots"),
             py::arg("members"), py::arg("first_slot"), py::arg("num_rows"), py::arg("idle_place"), py::arg("out"),
             py::arg("stream") = 0);
  module.def("engine_chunk", &engine_chunk, py::arg("residual"), py::arg("position"), py::arg("num_logits"),
             py::arg("out"), py::arg("depths") = py::none(), py::arg("masks") = py::none(),
             py::arg("start") = py::none(), py::arg("stream") = 0);
  module.def("engine_mask", &engine_mask, py::arg("positions"), py::arg("mask"), py::arg("window") = 0,
             py::arg("tree") = py::none(), py::arg("prefix") = 0, py::arg("start") = py::none(), py::arg("stream") = 0);
}

}  // namespace edgellm
