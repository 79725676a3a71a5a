#include "edgellm/cuda_try.hpp"

#include <atomic>
#include <cstdio>
#include <cstring>

namespace edgellm {
namespace {

// "To continue using CUDA, the process must be terminated and relaunched" (driver_types.h, of these codes).
bool ends_the_context(cudaError_t code) {
  switch (code) {
    case cudaErrorIllegalAddress:
    case cudaErrorLaunchTimeout:
    case cudaErrorAssert:
    case cudaErrorHardwareStackError:
    case cudaErrorIllegalInstruction:
    case cudaErrorMisalignedAddress:
    case cudaErrorInvalidAddressSpace:
    case cudaErrorInvalidPc:
    case cudaErrorLaunchFailure:
      return true;
    default:
      return false;
  }
}

std::string describe(cudaError_t code, const char* call, const char* file, int line) {
  const char* slash = std::strrchr(file, '/');
  return std::string(slash != nullptr ? slash + 1 : file) + ":" + std::to_string(line) + ": " + call +
         " failed: " + cudaGetErrorName(code) + " (" + cudaGetErrorString(code) + ")";
}

}  // namespace

void throw_cuda_error(cudaError_t code, const char* call, const char* file, int line) {
  (void)cudaGetLastError();
  const char* remedy = ends_the_context(code) ? "; this process can use the GPU no more: start it again" : "";
  throw CudaError(code, describe(code, call, file, line) + remedy);
}

void warn_cuda_error(cudaError_t code, const char* call, const char* file, int line) noexcept {
  (void)cudaGetLastError();
  if (code == cudaErrorCudartUnloading) return;  // the process ends, and with it everything that was to be freed
  // From now on every call fails with it: hundreds of events and graphs would bury the first error's message.
  static std::atomic<bool> told = false;
  if (ends_the_context(code) && told.exchange(true)) return;
  try {
    std::fprintf(stderr, "edgellm: %s\n", describe(code, call, file, line).c_str());
  } catch (...) {  // out of memory for the message: the code alone must do
    std::fprintf(stderr, "edgellm: CUDA error %d\n", static_cast<int>(code));
  }
}

}  // namespace edgellm
