// The device, its memory and its errors.
#include <cuda_runtime_api.h>

#include <exception>
#include <string>

#include "bindings.hpp"
#include "edgellm/cublaslt.hpp"
#include "edgellm/cuda_try.hpp"
#include "edgellm/memory.hpp"
#include "edgellm/read_bandwidth.hpp"

namespace py = pybind11;

namespace edgellm {
namespace {

// (number of GPUs, why there is none): asking must not fail on a machine without a driver.
py::tuple count_devices() {
  int count = 0;
  const cudaError_t code = cudaGetDeviceCount(&count);
  if (code != cudaSuccess) {
    (void)cudaGetLastError();
    return py::make_tuple(0, std::string(cudaGetErrorString(code)));
  }
  return py::make_tuple(count, std::string(count == 0 ? "CUDA sees no device" : ""));
}

py::dict device_info() {
  int device = 0;
  EDGELLM_CUDA_TRY(cudaGetDevice(&device));
  cudaDeviceProp properties{};
  EDGELLM_CUDA_TRY(cudaGetDeviceProperties(&properties, device));
  int driver = 0;
  EDGELLM_CUDA_TRY(cudaDriverGetVersion(&driver));
  const DeviceMemory memory = device_memory();
  py::dict info;
  info["index"] = device;
  info["name"] = std::string(properties.name);
  info["compute_capability"] = py::make_tuple(properties.major, properties.minor);
  info["num_sms"] = properties.multiProcessorCount;
  info["l2_bytes"] = properties.l2CacheSize;
  info["free_bytes"] = memory.free;
  info["total_bytes"] = memory.total;
  info["driver_cuda_version"] = driver;
  info["runtime_cuda_version"] = CUDART_VERSION;
  return info;
}

}  // namespace

void bind_device(py::module_& module) {
  py::register_exception_translator([](std::exception_ptr pointer) {
    try {
      if (pointer) std::rethrow_exception(pointer);
    } catch (const CudaError& error) {
      const py::object type = py::module_::import("edgellm_ros.errors").attr("DeviceError");
      PyErr_SetString(type.ptr(), error.what());
    }
  });
  module.attr("CUDA_MAJOR") = CUDART_VERSION / 1000;
  module.def("count_devices", &count_devices, "(number of GPUs, why there is none).");
  module.def("device_info", &device_info, "Name, compute capability, memory and versions of the current GPU.");
  module.def("products_reason", &MatrixProducts::unavailable_reason, "Why cuBLASLt is not there; empty when it is.");
  module.def(
      "allocation_count",
      [] {
        const AllocationCount count = allocation_count();
        return py::make_tuple(count.device, count.pinned);
      },
      "(device, pinned) allocations since the process began.");
  module.def("measure_read_bandwidth", &measure_read_bandwidth, py::arg("num_bytes"),
             py::call_guard<py::gil_scoped_release>(), "GB/s of a kernel that only reads.");
}

}  // namespace edgellm
