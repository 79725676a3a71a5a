// A failed launch by its kernel's name: every kernel is launched from the same line.
#include <cxxabi.h>

#include <cstdlib>
#include <memory>
#include <string>

#include "edgellm/cuda_try.hpp"

namespace edgellm {
namespace {

std::string name_of(const void* kernel) {
#if CUDART_VERSION >= 12030
  const char* mangled = nullptr;
  if (cudaFuncGetName(&mangled, kernel) == cudaSuccess && mangled != nullptr) {
    int status = 0;
    const std::unique_ptr<char, decltype(&std::free)> name(abi::__cxa_demangle(mangled, nullptr, nullptr, &status),
                                                           &std::free);
    return status == 0 ? name.get() : mangled;
  }
  (void)cudaGetLastError();
#else
  (void)kernel;
#endif
  return "a kernel";
}

}  // namespace

void throw_launch_error(cudaError_t code, const void* kernel, const char* file, int line) {
  (void)cudaGetLastError();
  throw_cuda_error(code, ("the launch of " + name_of(kernel)).c_str(), file, line);
}

}  // namespace edgellm
