// Prints the compute capability of every GPU here as "90 87"; nothing without a GPU or a driver. CMake runs it.
#include <cuda_runtime_api.h>

#include <cstdio>

int main() {
  int count = 0;
  if (cudaGetDeviceCount(&count) != cudaSuccess) return 0;
  for (int device = 0; device < count; ++device) {
    int major = 0;
    int minor = 0;
    cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
    cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
    std::printf(device > 0 ? " %d%d" : "%d%d", major, minor);
  }
  return 0;
}
