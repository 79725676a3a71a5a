// Turns CUDA's return codes into exceptions that name the place, the call and CUDA's own words.
#pragma once

#include <cuda_runtime_api.h>

#include <stdexcept>
#include <string>

namespace edgellm {

// The device failed. Python sees it as edgellm_ros.errors.DeviceError.
class CudaError : public std::runtime_error {
 public:
  CudaError(cudaError_t code, const std::string& message) : std::runtime_error(message), code_(code) {}
  cudaError_t code() const noexcept { return code_; }

 private:
  cudaError_t code_;
};

// Clears CUDA's sticky error, so that the next call is not blamed for this one, and throws CudaError.
[[noreturn]] void throw_cuda_error(cudaError_t code, const char* call, const char* file, int line);

// The same for a kernel (its host function) that could not be launched, with its name.
[[noreturn]] void throw_launch_error(cudaError_t code, const void* kernel, const char* file, int line);

// For destructors, which must not throw: prints the same message to stderr.
void warn_cuda_error(cudaError_t code, const char* call, const char* file, int line) noexcept;

}  // namespace edgellm

#define EDGELLM_CUDA_TRY(call)                                               \
  do {                                                                       \
    const cudaError_t edgellm_code_ = (call);                                \
    if (edgellm_code_ != cudaSuccess) {                                      \
      ::edgellm::throw_cuda_error(edgellm_code_, #call, __FILE__, __LINE__); \
    }                                                                        \
  } while (false)

#define EDGELLM_CUDA_WARN(call)                                             \
  do {                                                                      \
    const cudaError_t edgellm_code_ = (call);                               \
    if (edgellm_code_ != cudaSuccess) {                                     \
      ::edgellm::warn_cuda_error(edgellm_code_, #call, __FILE__, __LINE__); \
    }                                                                       \
  } while (false)
