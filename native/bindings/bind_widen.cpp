// widen.
#include "bindings.hpp"
#include "edgellm/kernels/widen.hpp"
#include "kernel_views.hpp"

namespace py = pybind11;

namespace edgellm {

void bind_widen(py::module_& module) {
  module.def(
      "widen",
      [](const py::object& y, const py::object& out, const py::object& bias, std::uintptr_t stream) {
        const DeviceArray to(out, "out");
        const std::int64_t tokens = to.size(0), width = to.size(1);
        if (width % 8 != 0) to.fail("has a width that is no multiple of 8");
        kernels::widen_async(required<const __nv_bfloat16>(y, "y", {tokens, width}),
                             optional<const float>(bias, "bias", {width}), to.as<float>({tokens, width}),
                             static_cast<int>(tokens), static_cast<int>(width), to_stream(stream), false);
      },
      py::arg("y"), py::arg("out"), py::arg("bias") = py::none(), py::arg("stream") = 0);
}

}  // namespace edgellm
