// The device, its memory and its errors.
#include <cuda_runtime_api.h>

#include <exception>
#include <sstream>
#include <string>

#include "bindings.hpp"
#include "edgellm/cublaslt.hpp"
#include "edgellm/cuda_try.hpp"
#include "edgellm/kernels/device_traits.hpp"
#include "edgellm/kernels/gemv.hpp"
#include "edgellm/memory.hpp"
#include "edgellm/read_bandwidth.hpp"

namespace py = pybind11;

namespace edgellm {
namespace {

std::string version_text(int version) {  // 13000 is 13.0
  return std::to_string(version / 1000) + "." + std::to_string(version % 1000 / 10);
}

// (number of GPUs, why there is none): asking must not fail on a machine without a driver.
py::tuple count_devices() {
  int count = 0;
  const cudaError_t code = cudaGetDeviceCount(&count);
  if (code == cudaSuccess) return py::make_tuple(count, std::string(count == 0 ? "CUDA sees no device" : ""));
  (void)cudaGetLastError();
  int driver = 0;
  std::string reason = cudaGetErrorString(code);
  if (code == cudaErrorInsufficientDriver && cudaDriverGetVersion(&driver) == cudaSuccess) {
    reason = driver == 0
                 ? "no NVIDIA driver is installed"
                 : "the driver is for CUDA " + version_text(driver) + ", the native module for CUDA " +
                       version_text(CUDART_VERSION) + "; update the driver, or build with an older CUDA toolkit";
  }
  return py::make_tuple(0, reason);
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
  info["integrated"] = properties.integrated != 0;  // one memory with the CPU, as on a Jetson
  info["num_sms"] = properties.multiProcessorCount;
  info["tiles_version"] = kernels::kGemvTilesVersion;  // of the numbers that `edgellm tune` keeps
  info["l2_bytes"] = properties.l2CacheSize;
  info["bus_bits"] = properties.memoryBusWidth;
  info["free_bytes"] = memory.free;
  info["total_bytes"] = memory.total;
  info["driver_cuda_version"] = driver;
  info["runtime_cuda_version"] = CUDART_VERSION;
  return info;
}

// What this module was compiled for: CMake says "80,87,90a".
py::tuple architectures() {
  py::list names;
  std::istringstream list(EDGELLM_ARCHITECTURES);
  for (std::string name; std::getline(list, name, ',');) names.append(name);
  return py::tuple(names);
}

// Without code for this GPU nothing is broken that another build would not mend: UnsupportedError, not DeviceError.
bool lacks_code(cudaError_t code) {
  return code == cudaErrorNoKernelImageForDevice || code == cudaErrorUnsupportedPtxVersion ||
         code == cudaErrorInvalidDeviceFunction;
}

void raise_in_python(const CudaError& error) {
  const py::module_ errors = py::module_::import("edgellm_ros.errors");
  if (!lacks_code(error.code())) {
    PyErr_SetString(errors.attr("DeviceError").ptr(), error.what());
    return;
  }
  int device = 0;
  cudaDeviceProp properties{};
  std::string gpu = "this GPU";
  if (cudaGetDevice(&device) == cudaSuccess && cudaGetDeviceProperties(&properties, device) == cudaSuccess) {
    gpu = std::string(properties.name) + " (architecture " + std::to_string(10 * properties.major + properties.minor) +
          ")";
  }
  const std::string message = "the native module was compiled for architectures " EDGELLM_ARCHITECTURES
                              " and has no code for " +
                              gpu + "; build it on this machine: make native (" + error.what() + ")";
  PyErr_SetString(errors.attr("UnsupportedError").ptr(), message.c_str());
}

}  // namespace

void bind_device(py::module_& module) {
  py::register_exception_translator([](std::exception_ptr pointer) {
    try {
      if (pointer) std::rethrow_exception(pointer);
    } catch (const CudaError& error) {
      raise_in_python(error);
    }
  });
  module.attr("VERSION") = EDGELLM_VERSION;  // of edgellm_ros, whose Python files belong to it
  module.attr("CUDA_MAJOR") = CUDART_VERSION / 1000;
  module.attr("CUDA_VERSION") = CUDART_VERSION;    // 13000 is 13.0
  module.attr("ARCHITECTURES") = architectures();  // ("80", "90a"): machine code
  module.attr("PTX_ARCHITECTURE") = EDGELLM_PTX;   // "120": PTX, which newer GPUs compile when they load it; "" is none
  module.attr("FAST_COMPILE") = EDGELLM_FAST_COMPILE != 0;  // built for checking, without optimisation
  module.def("count_devices", &count_devices, "(number of GPUs, why there is none).");
  module.def("has_clusters", &kernels::has_clusters,
             "Whether kernels run in thread block clusters, and launch dependents early, on the current GPU.");
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
