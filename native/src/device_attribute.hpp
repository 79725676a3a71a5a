// What the current device is like.
#pragma once

#include <cuda_runtime.h>

#include "edgellm/cuda_try.hpp"

namespace edgellm {

inline int device_attribute(cudaDeviceAttr attribute) {
  int device = 0;
  int value = 0;
  EDGELLM_CUDA_TRY(cudaGetDevice(&device));
  EDGELLM_CUDA_TRY(cudaDeviceGetAttribute(&value, attribute, device));
  return value;
}

}  // namespace edgellm
