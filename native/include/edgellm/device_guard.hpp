// The GPU that a thread works with.
#pragma once

#include <cuda_runtime_api.h>

#include "edgellm/cuda_try.hpp"

namespace edgellm {

inline int current_device() {
  int device = 0;
  EDGELLM_CUDA_TRY(cudaGetDevice(&device));
  return device;
}

// Makes `device` the thread's current one, and then the former one again: a thread starts with device 0, whichever
// its starter had, and a caller's choice is not ours to change. Giving it back makes CUDA use the former one, where it
// did not yet; so a thread that works for one decoder alone calls TokenLoop::make_current once.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) : former_(current_device()), changed_(former_ != device) {
    if (changed_) EDGELLM_CUDA_TRY(cudaSetDevice(device));
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;
  ~DeviceGuard() {
    if (changed_) EDGELLM_CUDA_WARN(cudaSetDevice(former_));
  }

 private:
  int former_;
  bool changed_;
};

}  // namespace edgellm
