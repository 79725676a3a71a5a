// An accepted path's keys and values moved together: kv_compact.
#include "bindings.hpp"
#include "edgellm/kernels/kv_compact.hpp"
#include "kernel_views.hpp"

namespace py = pybind11;

namespace edgellm {

void bind_kv_compact(py::module_& module) {
  module.def(
      "kv_compact",
      [](const py::object& cache, const py::object& slots, const py::object& positions, const py::object& paths,
         const py::object& counts, std::uintptr_t stream, bool pdl) {
        const DeviceArray array(cache, "cache");
        if (array.rank() != 6 || array.size(2) != 2) {
          array.fail("must be (layers, slots, 2, kv_heads, capacity, head_dim)");
        }
        if (array.bits() != 8 && array.bits() != 16) array.fail("must have numbers of 8 or 16 bits");
        kernels::KvCompactArgs args;
        args.cache = array.raw();
        args.format = array.bits() == 8 ? kernels::KvFormat::fp8 : kernels::KvFormat::bf16;
        args.num_slices = static_cast<int>(array.size(0));
        args.num_slots = static_cast<int>(array.size(1));
        args.num_heads = static_cast<int>(2 * array.size(3));
        args.capacity = static_cast<int>(array.size(4));
        args.head_dim = static_cast<int>(array.size(5));
        const DeviceArray path_array(paths, "paths");
        const std::int64_t sequences = path_array.size(0);
        args.paths = path_array.as<const std::int32_t>({sequences, -1});
        args.max_nodes = static_cast<int>(path_array.size(1));
        args.num_sequences = static_cast<int>(sequences);
        args.slots = required<const std::int32_t>(slots, "slots", {sequences});
        args.positions = required<const std::int32_t>(positions, "positions", {sequences});
        args.counts = required<const std::int32_t>(counts, "counts", {sequences});
        kernels::kv_compact_async(args, to_stream(stream), pdl);
      },
      py::arg("cache"), py::arg("slots"), py::arg("positions"), py::arg("paths"), py::arg("counts"),
      py::arg("stream") = 0, py::arg("pdl") = false);
}

}  // namespace edgellm
