// Sums and maxima over a block of kBlockThreads, and what rounding a row to E4M3 needs.
#pragma once

#include "device.cuh"

namespace edgellm::kernels {

constexpr int kBlockThreads = 256;
constexpr float kLargestFp8 = 448.0f;  // E4M3

// kUse tells calls in one kernel apart: each has shared memory of its own, so that none waits for the others' readers.
template <int kUse = 0>
__device__ __forceinline__ float block_sum(float v) {
  __shared__ float partial[kBlockThreads / 32];
  v = warp_sum(v);
  if ((threadIdx.x & 31) == 0) partial[threadIdx.x / 32] = v;
  __syncthreads();
  float sum = 0.0f;
#pragma unroll
  for (int i = 0; i < kBlockThreads / 32; i++) sum += partial[i];
  return sum;
}

__device__ __forceinline__ float block_max(float v) {
  __shared__ float partial[kBlockThreads / 32];
  v = warp_max(v);
  if ((threadIdx.x & 31) == 0) partial[threadIdx.x / 32] = v;
  __syncthreads();
  float largest = partial[0];
#pragma unroll
  for (int i = 1; i < kBlockThreads / 32; i++) largest = fmaxf(largest, partial[i]);
  return largest;
}

}  // namespace edgellm::kernels
