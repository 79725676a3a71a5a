// rope_kv_write.
#include "bindings.hpp"
#include "edgellm/kernels/rope.hpp"
#include "kernel_views.hpp"

namespace py = pybind11;

namespace edgellm {
namespace {

void rope_kv_write(const py::object& qkv, const py::object& kv, const py::object& slots, const py::object& positions,
                   const py::object& cos, const py::object& sin, const py::object& q_out, int num_heads,
                   const py::object& bias, const py::object& q_gain, const py::object& k_gain, float norm_eps,
                   std::uintptr_t stream, const py::object& row_scales, const py::object& column_scales) {
  kernels::RopeKvWriteArgs args;
  args.kv = kv_layer(kv);
  args.rope = rope_tables(cos, sin, q_gain, k_gain, norm_eps, args.kv);
  const DeviceArray input(qkv, "qkv");
  const std::int64_t tokens = input.size(0), head_dim = args.kv.head_dim;
  const std::int64_t width = (num_heads + 2 * args.kv.num_kv_heads) * head_dim;
  args.qkv_is_f32 = !input.is_bfloat();
  if (args.qkv_is_f32) {
    args.qkv = input.as<const float>({tokens, width});
  } else {
    args.qkv = input.as<const __nv_bfloat16>({tokens, width});
  }
  args.scales = product_scales(row_scales, column_scales, tokens, width);
  args.bias = features(bias, "bias", width);
  args.slots = required<const std::int32_t>(slots, "slots", {tokens});
  args.positions = required<const std::int32_t>(positions, "positions", {tokens});
  args.q_out = required<__nv_bfloat16>(q_out, "q_out", {tokens, num_heads * head_dim});
  args.num_tokens = static_cast<int>(tokens);
  args.num_heads = num_heads;
  kernels::rope_kv_write_async(args, to_stream(stream), false);
}

}  // namespace

void bind_rope(py::module_& module) {
  module.def("rope_kv_write", &rope_kv_write, py::arg("qkv"), py::arg("kv"), py::arg("slots"), py::arg("positions"),
             py::arg("cos"), py::arg("sin"), py::arg("q_out"), py::arg("num_heads"), py::arg("bias") = py::none(),
             py::arg("q_gain") = py::none(), py::arg("k_gain") = py::none(), py::arg("norm_eps") = 1e-6F,
             py::arg("stream") = 0, py::arg("row_scales") = py::none(), py::arg("column_scales") = py::none());
}

}  // namespace edgellm
