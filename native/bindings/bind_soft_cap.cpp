// soft_cap.
#include "bindings.hpp"
#include "edgellm/kernels/soft_cap.hpp"
#include "kernel_views.hpp"

namespace py = pybind11;

namespace edgellm {

void bind_soft_cap(py::module_& module) {
  module.def(
      "soft_cap",
      [](const py::object& x, float cap, std::uintptr_t stream) {
        if (!(cap > 0.0F)) throw std::invalid_argument("cap is " + std::to_string(cap) + "; it must be positive");
        const DeviceArray to(x, "x");
        const std::int64_t rows = to.size(0), width = to.size(1);
        kernels::soft_cap_async(to.as<float>({rows, width}), static_cast<std::size_t>(rows * width), cap,
                                to_stream(stream), false);
      },
      py::arg("x"), py::arg("cap"), py::arg("stream") = 0);
}

}  // namespace edgellm
