// map_input.
#include "bindings.hpp"
#include "edgellm/kernels/input_map.hpp"
#include "kernel_views.hpp"

namespace py = pybind11;

namespace edgellm {

void bind_input_map(py::module_& module) {
  module.def(
      "map_input",
      [](const py::object& x, const py::object& out, const py::object& order, const py::object& factor,
         std::uintptr_t stream) {
        const DeviceArray to(out, "out");
        const std::int64_t tokens = to.size(0), cols = to.size(1);
        if (cols % 8 != 0) to.fail("has a width that is no multiple of 8");
        kernels::InputMapArgs args;
        args.x = required<const __nv_bfloat16>(x, "x", {tokens, cols});
        args.out = to.as<__nv_bfloat16>({tokens, cols});
        args.order = optional<const std::int32_t>(order, "order", {cols});
        args.factor = optional<const float>(factor, "factor", {cols});
        args.num_tokens = static_cast<int>(tokens);
        args.cols = static_cast<int>(cols);
        kernels::map_input_async(args, to_stream(stream), false);
      },
      py::arg("x"), py::arg("out"), py::arg("order") = py::none(), py::arg("factor") = py::none(),
      py::arg("stream") = 0, "out[t, j] = x[t, order[j]] * factor[j].");
}

}  // namespace edgellm
