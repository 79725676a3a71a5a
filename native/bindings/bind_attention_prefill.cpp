// prefill_attention.
#include "bindings.hpp"
#include "edgellm/kernels/attention_prefill.hpp"
#include "kernel_views.hpp"

namespace py = pybind11;

namespace edgellm {
namespace {

void prefill_attention(const py::object& q, const py::object& kv, const py::object& starts, const py::object& slots,
                       const py::object& positions, const py::object& out, int max_tokens, float scale, int window,
                       std::uintptr_t stream) {
  kernels::PrefillAttentionArgs args;
  args.kv = kv_layer(kv);
  const DeviceArray input(q, "q");
  const std::int64_t tokens = input.size(0), width = input.size(1);
  args.num_heads = static_cast<int>(width / args.kv.head_dim);
  if (width % args.kv.head_dim != 0 || args.num_heads % args.kv.num_kv_heads != 0) {
    input.fail("does not hold whole groups of query heads");
  }
  args.q = input.as<const __nv_bfloat16>({tokens, width});
  const DeviceArray slot_array(slots, "slots");
  const std::int64_t sequences = slot_array.size(0);
  args.slots = slot_array.as<const std::int32_t>({sequences});
  args.starts = required<const std::int32_t>(starts, "starts", {sequences + 1});
  args.positions = required<const std::int32_t>(positions, "positions", {sequences});
  args.out = required<__nv_bfloat16>(out, "out", {tokens, width});
  args.num_sequences = static_cast<int>(sequences);
  args.max_tokens = max_tokens;
  args.window = window;
  args.scale = scale;
  kernels::prefill_attention_async(args, to_stream(stream), false);
}

}  // namespace

void bind_attention_prefill(py::module_& module) {
  module.def("prefill_attention", &prefill_attention, py::arg("q"), py::arg("kv"), py::arg("starts"), py::arg("slots"),
             py::arg("positions"), py::arg("out"), py::arg("max_tokens"), py::arg("scale"), py::arg("window") = 0,
             py::arg("stream") = 0);
}

}  // namespace edgellm
