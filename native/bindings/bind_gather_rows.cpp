// gather_rows.
#include "bindings.hpp"
#include "edgellm/kernels/gather_rows.hpp"
#include "kernel_views.hpp"

namespace py = pybind11;

namespace edgellm {

void bind_gather_rows(py::module_& module) {
  module.def(
      "gather_rows",
      [](const py::object& x, const py::object& rows, const py::object& out, std::uintptr_t stream) {
        const DeviceArray to(out, "out");
        const std::int64_t count = to.size(0), hidden = to.size(1);
        if (hidden % 8 != 0) to.fail("has a width that is no multiple of 8");
        kernels::gather_rows_async(required<const __nv_bfloat16>(x, "x", {-1, hidden}),
                                   required<const std::int32_t>(rows, "rows", {count}), static_cast<int>(count),
                                   static_cast<int>(hidden), to.as<__nv_bfloat16>({count, hidden}), to_stream(stream),
                                   false);
      },
      py::arg("x"), py::arg("rows"), py::arg("out"), py::arg("stream") = 0);
}

}  // namespace edgellm
