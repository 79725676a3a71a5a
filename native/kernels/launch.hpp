// How every kernel is launched: with programmatic dependent launch where asked for and known to the GPU.
#pragma once

#include <cuda_runtime.h>

#include <cassert>

#include "edgellm/cuda_try.hpp"

namespace edgellm::kernels {

// Of the current device, asked once a thread.
struct DeviceTraits {
  int device = -1;
  int num_sms = 0;
  std::size_t max_shared_bytes = 0;  // a block, statically allocated ones included
  std::size_t shared_bytes_of_sm = 0;
  bool has_dependent_launch = false;  // also thread block clusters: both came with compute capability 9.0
};

inline const DeviceTraits& device_traits() {
  thread_local DeviceTraits traits;
  int device = 0;
  EDGELLM_CUDA_TRY(cudaGetDevice(&device));
  if (traits.device != device) {
    int major = 0;
    EDGELLM_CUDA_TRY(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device));
    EDGELLM_CUDA_TRY(cudaDeviceGetAttribute(&traits.num_sms, cudaDevAttrMultiProcessorCount, device));
    int shared_bytes = 0;
    EDGELLM_CUDA_TRY(cudaDeviceGetAttribute(&shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
    traits.max_shared_bytes = static_cast<std::size_t>(shared_bytes);
    EDGELLM_CUDA_TRY(cudaDeviceGetAttribute(&shared_bytes, cudaDevAttrMaxSharedMemoryPerMultiprocessor, device));
    traits.shared_bytes_of_sm = static_cast<std::size_t>(shared_bytes);
    traits.has_dependent_launch = major >= 9;
    traits.device = device;
  }
  return traits;
}

// Dynamic shared memory that a kernel may have without asking for more, less what it has statically.
constexpr std::size_t kPlainSharedBytes = 38 * 1024;

// For kernels that hold what they read in registers: loads on their way take L1, of which the default leaves less. As
// much shared memory stays as decode attention of one sequence has, too, so that an SM need not change between them, or
// what the kernel's blocks on an SM need. `device` is the kernel's own, -1 at first: what has been asked for is not
// asked again.
template <class Kernel>
void prefer_l1(Kernel* kernel, std::size_t shared_bytes, int& device) {
  const DeviceTraits& traits = device_traits();
  if (device == traits.device) return;
  const std::size_t wanted = shared_bytes > 20 * 1024 ? shared_bytes : 20 * 1024;
  const int percent = static_cast<int>((100 * wanted + traits.shared_bytes_of_sm - 1) / traits.shared_bytes_of_sm);
  EDGELLM_CUDA_TRY(cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout, percent));
  device = traits.device;
}

template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, std::size_t shared_bytes, cudaStream_t stream,
            bool pdl, Arguments... arguments) {
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  config.attrs = &attribute;
  config.numAttrs = pdl && device_traits().has_dependent_launch ? 1 : 0;
  const cudaError_t code = cudaLaunchKernelEx(&config, kernel, Parameters(arguments)...);
  if (code != cudaSuccess) throw_launch_error(code, reinterpret_cast<const void*>(kernel), __FILE__, __LINE__);
  EDGELLM_CUDA_TRY(cudaGetLastError());
}

}  // namespace edgellm::kernels
