// Tensors cross to NumPy by copies, and to CUDA libraries by DLPack and __cuda_array_interface__ without one.
#include <cuda_runtime_api.h>
#include <pybind11/numpy.h>
#include <pybind11/stl.h>

#include <optional>
#include <span>
#include <stdexcept>
#include <string>
#include <vector>

#include "bindings.hpp"
#include "edgellm/cuda_try.hpp"
#include "edgellm/tensor.hpp"
#include "tensor_exchange.hpp"

namespace py = pybind11;

namespace edgellm {
namespace {

Shape to_shape(const std::vector<std::int64_t>& dims) { return Shape(std::span<const std::int64_t>(dims)); }

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
  // From pageable memory cudaMemcpy returns when the array may be reused, which can be before the data has arrived;
  // a non-blocking stream of another library would read the old data.
  EDGELLM_CUDA_TRY(cudaStreamSynchronize(cudaStreamLegacy));
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
      .def("to_numpy", &to_numpy, "A copy in host memory; bfloat16 as its bits in uint16, float8 in uint8. Waits.")
      .def("copy_from", &copy_from, py::arg("array"), "Fill from a NumPy array of the same dtype and size. Waits.")
      .def_static(
          "view",
          [](const py::object& array, std::optional<std::intptr_t> stream) {
            return tensor_view(array, stream.value_or(1));
          },
          py::arg("array"), py::arg("stream") = 1,
          "A view of another library's dense, writable device array, which it keeps alive. `stream` waits for "
          "the work that the array's library has put on its own; 1 and None are the legacy default stream, 2 the "
          "per-thread default one, more is a stream's address. With -1 nothing waits: the caller orders the work.")
      .def_property_readonly("__cuda_array_interface__", &cuda_array_interface)
      .def("__dlpack__", &to_dlpack, py::kw_only(), py::arg("stream") = py::none(), py::arg("max_version") = py::none(),
           py::arg("dl_device") = py::none(), py::arg("copy") = py::none(),
           "A DLPack capsule over the same memory, which keeps the tensor alive.")
      .def("__dlpack_device__", &dlpack_device, "(device type, device index), as DLPack numbers them.");
}

}  // namespace edgellm
