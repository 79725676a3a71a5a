// Prefill's matrix products on their own: MatrixProducts.
#include <memory>

#include "bindings.hpp"
#include "edgellm/cublaslt.hpp"
#include "kernel_views.hpp"

namespace py = pybind11;

namespace edgellm {
namespace {

// The products and what keeps their memory alive.
struct BoundProducts {
  DeviceArray memory;
  int max_rows;
  MatrixProducts products;

  BoundProducts(const py::object& array, int most_rows, bool row_invariant)
      : memory(array, "memory"),
        max_rows(most_rows),
        products(reinterpret_cast<std::byte*>(memory.as<std::uint8_t>({std::int64_t{MatrixProducts::kDeviceBytes}})),
                 max_rows, row_invariant) {}
};

ProductType type_of(const DeviceArray& weight, const DeviceArray& y) {
  if (!weight.is_bfloat()) {
    if (!y.is_bfloat()) y.fail("must be bf16 where the weight is fp8");
    return ProductType::fp8;
  }
  return y.is_bfloat() ? ProductType::bf16 : ProductType::bf16_to_fp32;
}

std::byte* operand(const DeviceArray& array, std::int64_t rows, std::int64_t cols) {
  if (array.is_bfloat()) return reinterpret_cast<std::byte*>(array.as<__nv_bfloat16>({rows, cols}));
  return reinterpret_cast<std::byte*>(array.as<std::uint8_t>({rows, cols}));
}

std::byte* result(const DeviceArray& y, std::int64_t rows, std::int64_t cols) {
  if (y.is_bfloat()) return reinterpret_cast<std::byte*>(y.as<__nv_bfloat16>({rows, cols}));
  return reinterpret_cast<std::byte*>(y.as<float>({rows, cols}));
}

bool prepare(BoundProducts& self, const py::object& weight, const py::object& x, const py::object& y,
             std::uintptr_t stream) {
  const DeviceArray from(weight, "weight");
  const DeviceArray input(x, "x");
  const DeviceArray to(y, "y");
  const std::int64_t rows = from.size(0), cols = from.size(1);
  ProductTrial trial;
  trial.weight = operand(from, rows, cols);
  trial.x = operand(input, self.max_rows, cols);
  trial.y = result(to, self.max_rows, rows);
  return self.products.prepare(type_of(from, to), static_cast<int>(rows), static_cast<int>(cols), trial,
                               to_stream(stream));
}

void run(BoundProducts& self, const py::object& x, const py::object& weight, const py::object& y,
         std::uintptr_t stream) {
  const DeviceArray from(weight, "weight");
  const DeviceArray input(x, "x");
  const DeviceArray to(y, "y");
  const std::int64_t rows = from.size(0), cols = from.size(1), count = input.size(0);
  if (from.is_bfloat() != input.is_bfloat()) input.fail("has another type than the weight");
  self.products.run_async(type_of(from, to), operand(input, count, cols), operand(from, rows, cols),
                          result(to, count, rows), static_cast<int>(count), static_cast<int>(rows),
                          static_cast<int>(cols), static_cast<int>(rows), to_stream(stream));
}

}  // namespace

void bind_products(py::module_& module) {
  py::class_<BoundProducts>(module, "MatrixProducts", "Products with a transposed weight through cuBLASLt.")
      .def(py::init<const py::object&, int, bool>(), py::arg("memory"), py::arg("max_rows"), py::arg("row_invariant"))
      .def_property_readonly_static("DEVICE_BYTES", [](const py::object&) { return MatrixProducts::kDeviceBytes; })
      .def("prepare", &prepare, py::arg("weight"), py::arg("x"), py::arg("y"), py::arg("stream") = 0,
           "Chooses the algorithms of a weight shape on these arrays, whose contents are lost; x has max_rows rows.")
      .def("run", &run, py::arg("x"), py::arg("weight"), py::arg("y"), py::arg("stream") = 0);
}

}  // namespace edgellm
