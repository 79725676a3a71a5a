// Tensors cross to NumPy by copies, and to CUDA libraries by DLPack and __cuda_array_interface__ without one.
#include <cuda_runtime_api.h>
#include <pybind11/numpy.h>
#include <pybind11/stl.h>

#include <array>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "bindings.hpp"
#include "dlpack.hpp"
#include "edgellm/cuda_try.hpp"
#include "edgellm/tensor.hpp"

namespace py = pybind11;

namespace edgellm {
namespace {

Shape to_shape(const std::vector<std::int64_t>& dims) { return Shape(std::span<const std::int64_t>(dims)); }

py::tuple to_tuple(const Shape& shape) {
  py::tuple dims(static_cast<std::size_t>(shape.rank()));
  for (int i = 0; i < shape.rank(); ++i) dims[static_cast<std::size_t>(i)] = shape[i];
  return dims;
}

// NumPy has no bfloat16: its bits cross as uint16.
py::dtype numpy_dtype(DType dtype) { return py::dtype(dtype == DType::kBFloat16 ? "uint16" : name_of(dtype)); }

py::array to_numpy(const Tensor& tensor) {
  py::array array(numpy_dtype(tensor.dtype()),
                  std::vector<py::ssize_t>(tensor.shape().dims().begin(), tensor.shape().dims().end()));
  void* to = array.mutable_data();
  const py::gil_scoped_release release;
  EDGELLM_CUDA_TRY(cudaMemcpy(to, tensor.data(), tensor.num_bytes(), cudaMemcpyDefault));
  return array;
}

void copy_from(const Tensor& tensor, const py::array& array) {
  const py::array dense = py::array::ensure(array, py::array::c_style);
  if (!dense || !dense.dtype().equal(numpy_dtype(tensor.dtype())) ||
      static_cast<std::size_t>(dense.nbytes()) != tensor.num_bytes()) {
    throw std::invalid_argument("the array's dtype or size is not that of a " + std::string(name_of(tensor.dtype())) +
                                " tensor of shape " + tensor.shape().to_string());
  }
  const void* from = dense.data();
  const py::gil_scoped_release release;
  EDGELLM_CUDA_TRY(cudaMemcpy(tensor.data(), from, tensor.num_bytes(), cudaMemcpyDefault));
}

py::dict cuda_array_interface(const Tensor& tensor) {
  if (tensor.dtype() == DType::kBFloat16) {
    throw py::attribute_error("__cuda_array_interface__ has no bfloat16; use DLPack");
  }
  if (tensor.kind() != MemoryKind::kDevice) throw py::attribute_error("the tensor is in host memory");
  py::dict interface;
  interface["shape"] = to_tuple(tensor.shape());
  interface["typestr"] = numpy_dtype(tensor.dtype()).attr("str");
  interface["data"] = py::make_tuple(reinterpret_cast<std::uintptr_t>(tensor.data()), false);
  interface["strides"] = py::none();
  interface["version"] = 3;
  return interface;
}

int current_device() {
  int device = 0;
  EDGELLM_CUDA_TRY(cudaGetDevice(&device));
  return device;
}

// What a consumer holds: the Python tensor stays alive until its deleter runs.
struct Exported {
  dlpack::DLManagedTensor managed{};
  std::array<std::int64_t, Shape::kMaxRank> shape{};
  py::object owner;
};

dlpack::DLDataType dlpack_dtype(DType dtype) {
  const auto bits = static_cast<std::uint8_t>(8 * size_of(dtype));
  switch (dtype) {
    case DType::kFloat32:
    case DType::kFloat16:
      return {dlpack::kFloat, bits, 1};
    case DType::kBFloat16:
      return {dlpack::kBfloat, bits, 1};
    case DType::kUInt8:
      return {dlpack::kUInt, bits, 1};
    default:
      return {dlpack::kInt, bits, 1};
  }
}

py::capsule to_dlpack(const py::object& self) {
  const auto& tensor = self.cast<const Tensor&>();
  auto exported = std::make_unique<Exported>();
  const auto dims = tensor.shape().dims();
  std::copy(dims.begin(), dims.end(), exported->shape.begin());
  exported->owner = self;
  dlpack::DLTensor& view = exported->managed.dl_tensor;
  view.data = tensor.data();
  view.device = {tensor.kind() == MemoryKind::kDevice ? dlpack::kCuda : dlpack::kCudaHost, current_device()};
  view.ndim = tensor.shape().rank();
  view.dtype = dlpack_dtype(tensor.dtype());
  view.shape = exported->shape.data();
  exported->managed.manager_ctx = exported.get();
  exported->managed.deleter = [](dlpack::DLManagedTensor* managed) {
    const py::gil_scoped_acquire acquire;  // a consumer may free it on any thread
    delete static_cast<Exported*>(managed->manager_ctx);
  };
  // A capsule that nobody consumed keeps its name, and frees what it holds.
  return py::capsule(&exported.release()->managed, "dltensor", [](PyObject* capsule) {
    if (PyCapsule_IsValid(capsule, "dltensor") == 0) return;
    auto* managed = static_cast<dlpack::DLManagedTensor*>(PyCapsule_GetPointer(capsule, "dltensor"));
    managed->deleter(managed);
  });
}

}  // namespace

void bind_tensor(py::module_& module) {
  py::class_<Tensor>(module, "Tensor", "A dense tensor in device or pinned host memory.")
      .def(py::init([](const std::string& dtype, const std::vector<std::int64_t>& shape, bool pinned) {
             return Tensor(dtype_from_name(dtype), to_shape(shape), pinned ? MemoryKind::kPinned : MemoryKind::kDevice);
           }),
           py::arg("dtype"), py::arg("shape"), py::arg("pinned") = false)
      .def_static(
          "borrow",
          [](std::uintptr_t data, const std::string& dtype, const std::vector<std::int64_t>& shape) {
            return Tensor::borrow(reinterpret_cast<void*>(data), dtype_from_name(dtype), to_shape(shape));
          },
          py::arg("data"), py::arg("dtype"), py::arg("shape"),
          "A view of device memory at an address, which must outlive it.")
      .def_property_readonly("dtype", [](const Tensor& tensor) { return name_of(tensor.dtype()); })
      .def_property_readonly("shape", [](const Tensor& tensor) { return to_tuple(tensor.shape()); })
      .def_property_readonly("data", [](const Tensor& t) { return reinterpret_cast<std::uintptr_t>(t.data()); })
      .def_property_readonly("num_bytes", &Tensor::num_bytes)
      .def_property_readonly("owns", &Tensor::owns)
      .def(
          "reshape", [](Tensor& tensor, const std::vector<std::int64_t>& shape) { tensor.reshape(to_shape(shape)); },
          py::arg("shape"), "Another shape over the same memory, in place; never allocates.")
      .def("to_numpy", &to_numpy, "A copy in host memory; bfloat16 as its bits in uint16. Waits.")
      .def("copy_from", &copy_from, py::arg("array"), "Fill from a NumPy array of the same dtype and size. Waits.")
      .def_property_readonly("__cuda_array_interface__", &cuda_array_interface)
      .def(
          "__dlpack__", [](const py::object& self, const py::kwargs&) { return to_dlpack(self); },
          "A DLPack capsule over the same memory; the producer's work is complete, so streams need no order.")
      .def("__dlpack_device__", [](const Tensor& tensor) {
        const int type = tensor.kind() == MemoryKind::kDevice ? dlpack::kCuda : dlpack::kCudaHost;
        return py::make_tuple(type, current_device());
      });
}

}  // namespace edgellm
