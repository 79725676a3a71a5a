// What the current GPU can do, and the code that the driver has taken or made for it.
#include <cstdlib>
#include <map>
#include <string_view>
#include <tuple>

#include "edgellm/kernels/device_traits.hpp"
#include "launch.hpp"

namespace edgellm::kernels {

namespace {

__global__ void probe_kernel() {}

// What older GPUs run can be compared, and tested, on a newer one.
bool clusters_are_wanted() {
  const char* setting = std::getenv("EDGELLM_CUDA_CLUSTERS");
  return setting == nullptr || std::string_view(setting) != "0";
}

}  // namespace

const DeviceTraits& device_traits() {
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
    cudaFuncAttributes code = {};
    EDGELLM_CUDA_TRY(cudaFuncGetAttributes(&code, probe_kernel));
    traits.has_dependent_launch = major >= 9 && code.ptxVersion >= 90 && clusters_are_wanted();
    int driver = 0;
    EDGELLM_CUDA_TRY(cudaDriverGetVersion(&driver));
    traits.has_launch_carveout = driver >= 12050;
    traits.device = device;
  }
  return traits;
}

bool has_clusters() { return device_traits().has_dependent_launch; }

bool runs_in_clusters(const void* kernel, int num_blocks, int num_threads, std::size_t shared_bytes) {
  const DeviceTraits& traits = device_traits();
  if (!traits.has_dependent_launch) return false;
  thread_local std::map<std::tuple<int, const void*, int, int, std::size_t>, bool> known;
  const auto key = std::make_tuple(traits.device, kernel, num_blocks, num_threads, shared_bytes);
  if (const auto entry = known.find(key); entry != known.end()) return entry->second;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(num_blocks));
  config.blockDim = dim3(static_cast<unsigned>(num_threads));
  config.dynamicSmemBytes = shared_bytes;
  int most = 1;
  EDGELLM_CUDA_TRY(cudaOccupancyMaxPotentialClusterSize(&most, kernel, &config));
  return known[key] = most >= num_blocks;
}

}  // namespace edgellm::kernels
