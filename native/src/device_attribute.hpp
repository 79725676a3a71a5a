// What the current device is like.
#pragma once

#include <cuda_runtime.h>

#include "edgellm/cuda_try.hpp"
#include "edgellm/device_guard.hpp"

namespace edgellm {

inline int device_attribute(cudaDeviceAttr attribute) {
  int value = 0;
  EDGELLM_CUDA_TRY(cudaDeviceGetAttribute(&value, attribute, current_device()));
  return value;
}

}  // namespace edgellm
