// What the blocks of one sampled sequence share: barriers, reads of each other's shared memory, sums and maxima over
// all.
#pragma once

#include <cuda_runtime.h>

#include "cluster.cuh"
#include "device.cuh"

namespace edgellm::kernels {

using uint64 = unsigned long long;

constexpr int kSamplingThreads = 1024;
constexpr int kSamplingWarps = kSamplingThreads / 32;
constexpr int kSamplingBlocks = 8;  // a sequence, where the GPU has clusters

// The blocks of one sequence. A single block works without cluster instructions.
struct Cluster {
  int rank;
  int size;

  __device__ __forceinline__ void barrier() const {
    if (size > 1) {
      cluster_barrier();
    } else {
      __syncthreads();
    }
  }
  // *p of block `r`; p is in shared memory.
  __device__ __forceinline__ uint64 load(const uint64* p, int r) const {
#if __CUDA_ARCH__ >= 900
    if (size > 1) {
      uint64 v;
      asm volatile("ld.shared::cluster.u64 %0,[%1];" : "=l"(v) : "r"(cluster_address(p, r)) : "memory");
      return v;
    }
#endif
    return *p;
  }
  __device__ __forceinline__ uint32_t load(const uint32_t* p, int r) const {
#if __CUDA_ARCH__ >= 900
    if (size > 1) {
      uint32_t v;
      asm volatile("ld.shared::cluster.u32 %0,[%1];" : "=r"(v) : "r"(cluster_address(p, r)) : "memory");
      return v;
    }
#endif
    return *p;
  }
};

// The block's part in sums and maxima over the cluster.
struct Exchange {
  uint64 warp_values[kSamplingWarps];
  uint64 block_values[8];  // one entry an exchange, never reused, so that slow blocks may still read it
};

__device__ __forceinline__ float key_value(uint64 key) {
  const uint32_t bits = static_cast<uint32_t>(key >> 32);
  return __uint_as_float(bits & 0x80000000u ? bits & 0x7fffffffu : ~bits);
}

__device__ __forceinline__ uint64 warp_sum64(uint64 v) {
#pragma unroll
  for (int s = 16; s >= 1; s >>= 1) v += __shfl_xor_sync(kAllLanes, v, s);
  return v;
}

// *p += v in shared memory, as two 32-bit additions, for the 64-bit one is a loop of compare-and-swap. A carry goes up
// whenever the low half wraps, in whatever order the threads come: *p is whole after the next barrier.
__device__ __forceinline__ void shared_add64(uint64* p, uint64 v) {
  auto* halves = reinterpret_cast<uint32_t*>(p);
  const uint32_t low = static_cast<uint32_t>(v), before = atomicAdd(halves, low);
  const uint32_t high = static_cast<uint32_t>(v >> 32) + (before + low < before ? 1u : 0u);
  if (high) atomicAdd(halves + 1, high);
}

// Sum over the lanes up to this one.
__device__ __forceinline__ uint64 warp_running_sum64(uint64 v, int lane) {
#pragma unroll
  for (int s = 1; s < 32; s <<= 1) {
    const uint64 before = __shfl_up_sync(kAllLanes, v, s);
    if (lane >= s) v += before;
  }
  return v;
}

enum class Combine { sum, max };

// Over all threads of the block, in every thread.
template <Combine kHow>
__device__ uint64 block_combine(Exchange& exchange, uint64 v) {
  const auto join = [](uint64 a, uint64 b) { return kHow == Combine::sum ? a + b : larger(a, b); };
#pragma unroll
  for (int s = 16; s >= 1; s >>= 1) v = join(v, __shfl_xor_sync(kAllLanes, v, s));
  if ((threadIdx.x & 31) == 0) exchange.warp_values[threadIdx.x / 32] = v;
  __syncthreads();
  v = exchange.warp_values[threadIdx.x & 31];
#pragma unroll
  for (int s = 16; s >= 1; s >>= 1) v = join(v, __shfl_xor_sync(kAllLanes, v, s));
  __syncthreads();
  return v;
}

// Over all threads of the cluster. Entry `entry` of Exchange::block_values keeps the block's own value.
template <Combine kHow>
__device__ uint64 cluster_combine(Exchange& exchange, const Cluster& cluster, uint64 v, int entry) {
  v = block_combine<kHow>(exchange, v);
  if (threadIdx.x == 0) exchange.block_values[entry] = v;
  cluster.barrier();
  v = cluster.load(&exchange.block_values[entry], 0);
  for (int r = 1; r < cluster.size; r++) {
    const uint64 other = cluster.load(&exchange.block_values[entry], r);
    v = kHow == Combine::sum ? v + other : larger(v, other);
  }
  return v;
}

}  // namespace edgellm::kernels
