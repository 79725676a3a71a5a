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

__device__ __forceinline__ uint32_t pack_fp8(const float4& v) {
  const uint32_t low = __nv_cvt_float2_to_fp8x2(make_float2(v.x, v.y), __NV_SATFINITE, __NV_E4M3);
  const uint32_t high = __nv_cvt_float2_to_fp8x2(make_float2(v.z, v.w), __NV_SATFINITE, __NV_E4M3);
  return low | high << 16;
}

}  // namespace edgellm::kernels
