// A tree of new tokens a sequence: tree_attention, tree_attention_workspace_bytes.
#include "bindings.hpp"
#include "edgellm/kernels/attention_tree.hpp"
#include "kernel_views.hpp"

namespace py = pybind11;

namespace edgellm {
namespace {

void tree_attention(const py::object& qkv, const py::object& kv, const py::object& starts, const py::object& slots,
                    const py::object& positions, const py::object& depths, const py::object& masks,
                    const py::object& cos, const py::object& sin, const py::object& out, int max_tokens, int num_heads,
                    float scale, const py::object& q_gain, const py::object& k_gain, float norm_eps, int window,
                    int splits, int most_rows, const py::object& workspace, std::uintptr_t stream, bool pdl) {
  kernels::TreeAttentionArgs args;
  args.kv = kv_layer(kv);
  args.rope = rope_tables(cos, sin, q_gain, k_gain, norm_eps, args.kv);
  if (num_heads < 1 || num_heads % args.kv.num_kv_heads != 0) {
    throw std::invalid_argument("num_heads " + std::to_string(num_heads) + " is not a multiple of the cache's " +
                                std::to_string(args.kv.num_kv_heads) + " kv_heads");
  }
  if (max_tokens < 1 || max_tokens > kernels::kMaxTreeTokens) {
    throw std::invalid_argument("max_tokens " + std::to_string(max_tokens) + " is not 1 to " +
                                std::to_string(kernels::kMaxTreeTokens));
  }
  if (splits < 0 || splits > kernels::kMaxTreeSplits) {
    throw std::invalid_argument("splits " + std::to_string(splits) + " is not 0 to " +
                                std::to_string(kernels::kMaxTreeSplits));
  }
  if (most_rows != 0 && most_rows != 32 && most_rows != 64) {
    throw std::invalid_argument("most_rows " + std::to_string(most_rows) + " is not 0, 32 or 64");
  }
  const DeviceArray input(qkv, "qkv"), slot_array(slots, "slots");
  const std::int64_t tokens = input.size(0), head_dim = args.kv.head_dim, sequences = slot_array.size(0);
  if (sequences < 1 || sequences > kernels::kMaxTreeSequences) slot_array.fail("has too many sequences");
  args.qkv = input.as<const float>({tokens, (num_heads + 2 * args.kv.num_kv_heads) * head_dim});
  args.slots = slot_array.as<const std::int32_t>({sequences});
  args.starts = required<const std::int32_t>(starts, "starts", {sequences + 1});
  args.positions = required<const std::int32_t>(positions, "positions", {sequences});
  args.depths = required<const std::int32_t>(depths, "depths", {tokens});
  args.masks = required<const std::uint64_t>(masks, "masks", {tokens});
  args.out = required<__nv_bfloat16>(out, "out", {tokens, num_heads * head_dim});
  args.num_sequences = static_cast<int>(sequences);
  args.max_tokens = max_tokens;
  args.num_heads = num_heads;
  args.window = window;
  args.scale = scale;
  args.splits = splits;
  args.most_rows = most_rows;
  const DeviceArray scratch(workspace, "workspace");
  args.workspace = scratch.raw();
  const auto wanted =
      kernels::tree_attention_workspace_bytes(static_cast<int>(sequences) * max_tokens, num_heads, args.kv.head_dim);
  if (scratch.num_bytes() < static_cast<std::int64_t>(wanted)) scratch.fail("is too small");
  kernels::tree_attention_async(args, to_stream(stream), pdl);
}

}  // namespace

void bind_attention_tree(py::module_& module) {
  module.attr("MAX_TREE_TOKENS") = kernels::kMaxTreeTokens;
  module.attr("MAX_TREE_SPLITS") = kernels::kMaxTreeSplits;
  module.def("tree_attention_workspace_bytes", &kernels::tree_attention_workspace_bytes, py::arg("max_tokens"),
             py::arg("num_heads"), py::arg("head_dim"));
  module.def("tree_attention", &tree_attention, py::arg("qkv"), py::arg("kv"), py::arg("starts"), py::arg("slots"),
             py::arg("positions"), py::arg("depths"), py::arg("masks"), py::arg("cos"), py::arg("sin"), py::arg("out"),
             py::arg("max_tokens"), py::arg("num_heads"), py::arg("scale"), py::arg("q_gain") = py::none(),
             py::arg("k_gain") = py::none(), py::arg("norm_eps") = 1e-6F, py::arg("window") = 0, py::arg("splits") = 0,
             py::arg("most_rows") = 0, py::arg("workspace"), py::arg("stream") = 0, py::arg("pdl") = false);
}

}  // namespace edgellm
