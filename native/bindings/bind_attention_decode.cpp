// One new token a sequence: decode_attention, and how much workspace and how many splits it takes.
#include "bindings.hpp"
#include "edgellm/kernels/attention_decode.hpp"
#include "kernel_views.hpp"

namespace py = pybind11;

namespace edgellm {

void bind_attention_decode(py::module_& module) {
  module.attr("MAX_DECODE_SPLITS") = kernels::kMaxDecodeSplits;
  module.attr("LONG_CONTEXT") = kernels::kLongContext;
  module.attr("MAX_DECODE_BATCH") = kernels::kMaxDecodeBatch;
  module.def("decode_attention_workspace_bytes", &kernels::decode_attention_workspace_bytes, py::arg("max_batch"),
             py::arg("num_heads"), py::arg("head_dim"));
  module.def("decode_attention_splits", &kernels::decode_attention_splits, py::arg("length"), py::arg("most_splits"));
  module.def("decode_attention_most_splits", &kernels::decode_attention_most_splits, py::arg("num_kv_heads"),
             py::arg("num_sms"));
  module.def("decode_attention_splits_per_block", &kernels::decode_attention_splits_per_block, py::arg("splits"),
             py::arg("rows"), py::arg("num_sms"), py::arg("blocks_per_sm"));
  module.def(
      "decode_attention",
      [](const py::object& qkv, const py::object& kv, const py::object& slots, const py::object& positions,
         const py::object& cos, const py::object& sin, const py::object& out, int num_heads, float scale,
         const py::object& q_gain, const py::object& k_gain, float norm_eps, int window, int most_splits,
         int most_attended, int cluster, int splits_per_block, bool exchanges, const py::object& workspace,
         std::uintptr_t stream, bool pdl) {
        kernels::DecodeAttentionArgs args;
        args.kv = kv_layer(kv);
        args.rope = rope_tables(cos, sin, q_gain, k_gain, norm_eps, args.kv);
        const DeviceArray input(qkv, "qkv");
        const std::int64_t batch = input.size(0), head_dim = args.kv.head_dim;
        if (num_heads < 1 || num_heads % args.kv.num_kv_heads != 0) {
          throw std::invalid_argument("num_heads is not a multiple of the cache's kv_heads");
        }
        if (most_splits < 1 || most_splits > kernels::kMaxDecodeSplits || (most_splits & (most_splits - 1)) != 0) {
          throw std::invalid_argument("most_splits " + std::to_string(most_splits) +
                                      " is not a power of two from 1 to 64");
        }
        if (most_attended < 1) throw std::invalid_argument("most_attended is not positive");
        if (cluster != 0 && cluster != 1 && cluster != 8) {
          throw std::invalid_argument("cluster " + std::to_string(cluster) + " is not 0, 1 or 8");
        }
        if (splits_per_block < 0 || splits_per_block > 8 || (splits_per_block & (splits_per_block - 1)) != 0) {
          throw std::invalid_argument("splits_per_block " + std::to_string(splits_per_block) +
                                      " is not 0, 1, 2, 4 or 8");
        }
        if (batch > kernels::kMaxDecodeBatch) throw std::invalid_argument("the batch is larger than MAX_DECODE_BATCH");
        args.qkv = input.as<const float>({batch, (num_heads + 2 * args.kv.num_kv_heads) * head_dim});
        if (reinterpret_cast<std::uintptr_t>(args.qkv) % 16 != 0) input.fail("must be 16-byte aligned");
        args.slots = required<const std::int32_t>(slots, "slots", {batch});
        args.positions = required<const std::int32_t>(positions, "positions", {batch});
        args.out = required<__nv_bfloat16>(out, "out", {batch, num_heads * head_dim});
        args.batch = static_cast<int>(batch);
        args.num_heads = num_heads;
        args.window = window;
        args.scale = scale;
        args.most_splits = most_splits;
        args.most_attended = most_attended;
        args.cluster = cluster;
        args.splits_per_block = splits_per_block;
        args.exchanges = exchanges;
        const DeviceArray scratch(workspace, "workspace");
        args.workspace = scratch.raw();
        const auto wanted = kernels::decode_attention_workspace_bytes(args.batch, num_heads, args.kv.head_dim);
        if (scratch.num_bytes() < static_cast<std::int64_t>(wanted)) scratch.fail("is too small");
        kernels::decode_attention_async(args, to_stream(stream), pdl);
      },
      py::arg("qkv"), py::arg("kv"), py::arg("slots"), py::arg("positions"), py::arg("cos"), py::arg("sin"),
      py::arg("out"), py::arg("num_heads"), py::arg("scale"), py::arg("q_gain") = py::none(),
      py::arg("k_gain") = py::none(), py::arg("norm_eps") = 1e-6F, py::arg("window") = 0, py::arg("most_splits") = 8,
      py::arg("most_attended") = kernels::kContextClasses[0], py::arg("cluster") = 0, py::arg("splits_per_block") = 0,
      py::arg("exchanges") = true, py::arg("workspace"), py::arg("stream") = 0, py::arg("pdl") = false);
}

}  // namespace edgellm
