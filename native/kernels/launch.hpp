// How every kernel is launched: with programmatic dependent launch where asked for and known to the GPU.
#pragma once

#include <cuda_runtime.h>

#include <cassert>

#include "edgellm/cuda_try.hpp"

namespace edgellm::kernels {

// Of the current device and of the code that runs on it, asked once a thread.
struct DeviceTraits {
  int device = -1;
  int num_sms = 0;
  std::size_t max_shared_bytes = 0;  // a block, statically allocated ones included
  std::size_t shared_bytes_of_sm = 0;
  // Also thread block clusters: both came with compute capability 9.0. PTX of an older one has instructions for
  // neither.
  bool has_dependent_launch = false;
  bool has_launch_carveout = false;  // a launch can say how much shared memory an SM is to have: CUDA 12.5
};

const DeviceTraits& device_traits();

// Whether the GPU runs this kernel in clusters of so many blocks: each lies in one part of it, and a slice of a GPU may
// have too few multiprocessors in any. For a kernel that may have so much dynamic shared memory.
bool runs_in_clusters(const void* kernel, int num_blocks, int num_threads, std::size_t shared_bytes);

// Dynamic shared memory that a kernel may have without asking for more, less what it has statically.
constexpr std::size_t kPlainSharedBytes = 38 * 1024;

// The part of an SM's shared memory, in percent, that its blocks need, which take `bytes` together. L1 gets the rest:
// loads on their way to registers take it. Not less than decode attention of one sequence has, too, so that an SM need
// not change between them.
inline int shared_memory_percent(std::size_t bytes) {
  const std::size_t wanted = bytes > 20 * 1024 ? bytes : 20 * 1024, all = device_traits().shared_bytes_of_sm;
  return wanted < all ? static_cast<int>((100 * wanted + all - 1) / all) : 100;
}

// For kernels that hold what they read in registers: the default leaves L1 less. `device` is the kernel's own, -1 at
// first: what has been asked for is not asked again.
template <class Kernel>
void prefer_l1(Kernel* kernel, std::size_t shared_bytes, int& device) {
  const DeviceTraits& traits = device_traits();
  if (device == traits.device) return;
  EDGELLM_CUDA_TRY(cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout,
                                        shared_memory_percent(shared_bytes)));
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
