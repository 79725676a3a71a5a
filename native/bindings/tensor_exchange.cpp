#include "tensor_exchange.hpp"

#include <cuda_runtime_api.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <memory>
#include <span>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "dlpack_import.hpp"
#include "edgellm/cuda_try.hpp"
#include "edgellm/stream.hpp"

namespace py = pybind11;

namespace edgellm {
namespace {

// In the order of DType.
constexpr std::array<dlpack::DLDataType, 8> kDlpackTypes{{{dlpack::kFloat, 32, 1},
                                                          {dlpack::kFloat, 16, 1},
                                                          {dlpack::kBfloat, 16, 1},
                                                          {dlpack::kInt, 8, 1},
                                                          {dlpack::kUInt, 8, 1},
                                                          {dlpack::kInt, 32, 1},
                                                          {dlpack::kInt, 64, 1},
                                                          {dlpack::kFloat8E4M3Fn, 8, 1}}};

// Both protocols number streams alike.
constexpr std::intptr_t kNoSynchronisation = -1;
constexpr const char* kAmbiguousStream =
    "stream 0 is ambiguous; 1 is the legacy default stream, 2 the per-thread default one";

DType from_dlpack_type(const dlpack::DLDataType& type) {
  for (std::size_t i = 0; i < kDlpackTypes.size(); ++i) {
    if (kDlpackTypes[i].code == type.code && kDlpackTypes[i].bits == type.bits) return static_cast<DType>(i);
  }
  throw std::invalid_argument("the array has DLPack type (" + std::to_string(type.code) + ", " +
                              std::to_string(type.bits) + " bits), which a Tensor does not have");
}

[[noreturn]] void refuse_buffer(const std::string& message) {
  PyErr_SetString(PyExc_BufferError, message.c_str());
  throw py::error_already_set();
}

dlpack::DLDevice device_of(const Tensor& tensor) {
  if (tensor.kind() != MemoryKind::kDevice) return {dlpack::kCudaHost, 0};
  int device = 0;
  cudaPointerAttributes attributes{};
  if (tensor.data() != nullptr) {
    EDGELLM_CUDA_TRY(cudaPointerGetAttributes(&attributes, tensor.data()));
    if (attributes.type == cudaMemoryTypeUnregistered) refuse_buffer("the borrowed address is not device memory");
    device = attributes.device;
  } else {
    EDGELLM_CUDA_TRY(cudaGetDevice(&device));
  }
  return {dlpack::kCuda, device};
}

// What a consumer holds: the Python tensor stays alive until its deleter runs.
template <typename Managed>
struct Exported {
  Managed managed{};
  std::array<std::int64_t, Shape::kMaxRank> shape{};
  std::array<std::int64_t, Shape::kMaxRank> strides{};
  py::object owner;

  static void destroy(Managed* managed) {
    if (Py_IsInitialized() == 0) return;   // the process ends: nothing of Python can be released any more
    const py::gil_scoped_acquire acquire;  // a consumer may free it on any thread
    delete static_cast<Exported*>(managed->manager_ctx);
  }
};

template <typename Managed>
std::unique_ptr<Exported<Managed>> make_export(const py::object& self) {
  const auto& tensor = self.cast<const Tensor&>();
  auto exported = std::make_unique<Exported<Managed>>();
  exported->owner = self;
  const auto dims = tensor.shape().dims();
  std::copy(dims.begin(), dims.end(), exported->shape.begin());
  std::int64_t stride = 1;
  for (std::size_t i = dims.size(); i-- > 0;) {  // since DLPack 1.2 strides must be there
    exported->strides[i] = stride;
    stride *= std::max<std::int64_t>(dims[i], 1);
  }
  dlpack::DLTensor& view = exported->managed.dl_tensor;
  view.data = tensor.data();
  view.device = device_of(tensor);
  view.ndim = tensor.shape().rank();
  view.dtype = kDlpackTypes[static_cast<std::size_t>(tensor.dtype())];
  view.shape = exported->shape.data();
  view.strides = exported->strides.data();
  exported->managed.manager_ctx = exported.get();
  exported->managed.deleter = &Exported<Managed>::destroy;
  return exported;
}

// A capsule that nobody consumed keeps its name, and frees what it holds.
template <typename Managed>
void destroy_capsule(PyObject* capsule, const char* name) {
  if (PyCapsule_IsValid(capsule, name) == 0) return;
  auto* managed = static_cast<Managed*>(PyCapsule_GetPointer(capsule, name));
  managed->deleter(managed);
}

// A view keeps `owner` alive.
py::object borrow(void* data, DType dtype, const std::vector<std::int64_t>& dims, const py::object& owner) {
  py::object view = py::cast(Tensor::borrow(data, dtype, Shape(std::span<const std::int64_t>(dims))));
  py::detail::keep_alive_impl(view, owner);
  return view;
}

py::object view_of_dlpack(const py::object& array, std::intptr_t stream) {
  // Asked first: a producer in host memory refuses a stream in words of its own.
  if (array.attr("__dlpack_device__")().cast<std::pair<int, int>>().first != dlpack::kCuda) {
    throw std::invalid_argument("the array is not in device memory");
  }
  auto imported = std::make_unique<dlpack::Imported>(array, "the array", stream);
  const dlpack::DLTensor& tensor = imported->tensor();
  if (tensor.device.device_type != dlpack::kCuda) throw std::invalid_argument("the array is not in device memory");
  if (imported->read_only()) throw std::invalid_argument("the array is read-only; copy it first");
  const std::vector<std::int64_t> dims(tensor.shape, tensor.shape + tensor.ndim);
  const DType dtype = from_dlpack_type(tensor.dtype);
  void* data = imported->data();
  const py::capsule owner(imported.get(), [](void* held) { delete static_cast<dlpack::Imported*>(held); });
  (void)imported.release();
  return borrow(data, dtype, dims, owner);
}

// A field of __cuda_array_interface__. Throws std::invalid_argument with its name and what is allowed.
template <typename T>
T field_of(const py::dict& interface, const char* name, const std::string& allowed) {
  const std::string where = std::string("the array's __cuda_array_interface__ has ");
  if (!interface.contains(name)) throw std::invalid_argument(where + "no " + name + "; it must be " + allowed);
  const py::object value = interface[name];
  try {
    return value.cast<T>();
  } catch (const py::cast_error&) {
    throw std::invalid_argument(where + name + " " + std::string(py::repr(value)) + "; it must be " + allowed);
  }
}

bool has_field(const py::dict& interface, const char* name) {
  return interface.contains(name) && !interface[name].is_none();
}

DType from_typestr(const std::string& typestr) {
  const py::dtype type(typestr);
  const DType dtype = dtype_from_name(py::str(type.attr("name")));
  if (!type.attr("isnative").cast<bool>()) {
    throw std::invalid_argument("the array's typestr is " + typestr + "; allowed is this machine's byte order, " +
                                std::string(py::str(numpy_dtype(dtype).attr("str"))));
  }
  return dtype;
}

py::object view_of_interface(const py::object& array, std::intptr_t stream) {
  const auto interface = array.attr("__cuda_array_interface__").cast<py::dict>();
  const auto shape = field_of<std::vector<std::int64_t>>(interface, "shape", "a tuple of integers");
  const DType dtype = from_typestr(field_of<std::string>(interface, "typestr", "a string of NumPy's, as <f4"));
  const auto [address, read_only] =
      field_of<std::pair<std::uintptr_t, bool>>(interface, "data", "(address, whether it is read-only)");
  if (read_only) throw std::invalid_argument("the array is read-only; copy it first");
  if (has_field(interface, "mask")) {
    const py::object mask = interface["mask"];  // named by its type: to print a device array is to wait for it
    throw std::invalid_argument("the array's mask is a " + std::string(Py_TYPE(mask.ptr())->tp_name) +
                                "; allowed is None, since a Tensor would show what is masked");
  }
  if (has_field(interface, "strides")) {
    const auto strides = field_of<std::vector<std::int64_t>>(interface, "strides", "None or a tuple of integers");
    if (strides.size() != shape.size()) {
      throw std::invalid_argument("the array's strides are " + std::string(py::repr(interface["strides"])) +
                                  " for shape " + std::string(py::repr(interface["shape"])) +
                                  "; allowed are None or one for each dimension");
    }
    if (!dlpack::is_dense(shape, strides.data(), static_cast<std::int64_t>(size_of(dtype)))) {  // in bytes
      throw std::invalid_argument("the array is not contiguous");
    }
  }
  // The producer's stream (1: legacy default, 2: per-thread default) has work on the array; None says that it has not.
  if (has_field(interface, "stream")) {
    const auto producer = field_of<std::uintptr_t>(interface, "stream", "None, 1, 2 or a stream's address");
    if (producer == 0) throw std::invalid_argument("the array's " + std::string(kAmbiguousStream));
    if (stream != kNoSynchronisation) {
      Event done;
      done.record(reinterpret_cast<cudaStream_t>(producer));
      EDGELLM_CUDA_TRY(cudaStreamWaitEvent(reinterpret_cast<cudaStream_t>(stream), done.get(), 0));
    }
  }
  return borrow(reinterpret_cast<void*>(address), dtype, shape, array);
}

}  // namespace

py::dtype numpy_dtype(DType dtype) {
  if (dtype == DType::kBFloat16) return py::dtype("uint16");
  if (dtype == DType::kFloat8E4M3Fn) return py::dtype("uint8");
  return py::dtype(name_of(dtype));
}

py::tuple to_tuple(const Shape& shape) {
  py::tuple dims(static_cast<std::size_t>(shape.rank()));
  for (int i = 0; i < shape.rank(); ++i) dims[static_cast<std::size_t>(i)] = shape[i];
  return dims;
}

py::capsule to_dlpack(const py::object& self, const py::object& stream, const py::object& max_version,
                      const py::object& dl_device, const py::object& copy) {
  const auto& tensor = self.cast<const Tensor&>();
  if (!stream.is_none() && stream.cast<std::intptr_t>() == 0) {
    throw std::invalid_argument(kAmbiguousStream);
  }
  if (!copy.is_none() && copy.cast<bool>()) refuse_buffer("a Tensor is exported without a copy; copy what you get");
  if (!dl_device.is_none() && !dl_device.equal(dlpack_device(tensor))) {
    refuse_buffer("a Tensor is exported where it is, " + std::string(py::str(dlpack_device(tensor))) + ", not on " +
                  std::string(py::str(dl_device)));
  }
  if (!max_version.is_none() && max_version.cast<std::pair<int, int>>().first >= 1) {
    using Managed = dlpack::DLManagedTensorVersioned;
    auto exported = make_export<Managed>(self);
    exported->managed.version = {1, 0};
    const py::capsule capsule(&exported->managed, dlpack::kVersionedCapsule,
                              [](PyObject* object) { destroy_capsule<Managed>(object, dlpack::kVersionedCapsule); });
    (void)exported.release();
    return capsule;
  }
  using Managed = dlpack::DLManagedTensor;
  auto exported = make_export<Managed>(self);
  const py::capsule capsule(&exported->managed, dlpack::kCapsule,
                            [](PyObject* object) { destroy_capsule<Managed>(object, dlpack::kCapsule); });
  (void)exported.release();
  return capsule;
}

py::tuple dlpack_device(const Tensor& tensor) {
  const dlpack::DLDevice device = device_of(tensor);
  return py::make_tuple(device.device_type, device.device_id);
}

py::dict cuda_array_interface(const Tensor& tensor) {
  if (tensor.dtype() == DType::kBFloat16 || tensor.dtype() == DType::kFloat8E4M3Fn) {
    throw py::attribute_error("__cuda_array_interface__ has no " + std::string(name_of(tensor.dtype())) +
                              "; use DLPack");
  }
  if (tensor.kind() != MemoryKind::kDevice) throw py::attribute_error("the tensor is in host memory");
  py::dict interface;
  interface["shape"] = to_tuple(tensor.shape());
  interface["typestr"] = numpy_dtype(tensor.dtype()).attr("str");
  interface["data"] = py::make_tuple(reinterpret_cast<std::uintptr_t>(tensor.data()), false);
  interface["strides"] = py::none();
  interface["stream"] = py::none();  // nothing to wait for
  interface["version"] = 3;
  return interface;
}

py::object tensor_view(const py::object& array, std::intptr_t stream) {
  if (stream == 0) throw std::invalid_argument(kAmbiguousStream);
  if (stream < kNoSynchronisation) {
    throw std::invalid_argument("stream is " + std::to_string(stream) +
                                "; allowed are None, -1 (no synchronisation), 1, 2 and a stream's address");
  }
  if (py::hasattr(array, "__dlpack__")) return view_of_dlpack(array, stream);
  if (py::hasattr(array, "__cuda_array_interface__")) return view_of_interface(array, stream);
  throw py::type_error("the array has neither __dlpack__ nor __cuda_array_interface__");
}

}  // namespace edgellm
