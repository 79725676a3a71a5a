// Thread block clusters (compute capability 9.0): barriers, and the shared memory of a cluster's other blocks.
//
// PTX ISA, barrier.cluster, mapa and ld / st.shared::cluster. Without clusters the functions do nothing and load zeros:
// callers ask only where their cluster has more than one block. A thread that has left counts as arrived.
#pragma once

#include "mbarrier.cuh"

namespace edgellm::kernels {

// First half of a barrier that orders nothing: it tells that this block runs, so that its shared memory may be written.
__device__ __forceinline__ void cluster_arrive_relaxed() {
#if __CUDA_ARCH__ >= 900
  __syncwarp();
  asm volatile("barrier.cluster.arrive.relaxed.aligned;");
#endif
}
__device__ __forceinline__ void cluster_wait() {
#if __CUDA_ARCH__ >= 900
  __syncwarp();
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
#endif
}
// What was written to any shared memory of the cluster before is seen by all after.
__device__ __forceinline__ void cluster_barrier() {
#if __CUDA_ARCH__ >= 900
  __syncwarp();
  asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
#endif
}

// Where *p, in this block's shared memory, lies in that of the block with this rank.
__device__ __forceinline__ uint32_t cluster_address(const void* p, int rank) {
  uint32_t address = 0;
#if __CUDA_ARCH__ >= 900
  address = shared_address(p);
  asm volatile("mapa.shared::cluster.u32 %0,%0,%1;" : "+r"(address) : "r"(rank));
#endif
  return address;
}
__device__ __forceinline__ float load_from_cluster(const float* p, int rank) {
  float v = 0.0f;
#if __CUDA_ARCH__ >= 900
  asm volatile("ld.shared::cluster.f32 %0,[%1];" : "=f"(v) : "r"(cluster_address(p, rank)) : "memory");
#endif
  return v;
}
__device__ __forceinline__ float4 load_from_cluster(const float4* p, int rank) {
  float4 v = {};
#if __CUDA_ARCH__ >= 900
  asm volatile("ld.shared::cluster.v4.f32 {%0,%1,%2,%3},[%4];"
               : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w)
               : "r"(cluster_address(p, rank))
               : "memory");
#endif
  return v;
}

// A store into another block's shared memory that counts its bytes on that block's mbarrier as they arrive: one way,
// where a plain store and a barrier after it are two. PTX ISA, st.async.
//
// Puts v where *p lies in the block with this rank, and counts it on the mbarrier that lies there as *mbarrier here.
__device__ __forceinline__ void store_async(float2* p, uint64_t* mbarrier, int rank, float2 v) {
#if __CUDA_ARCH__ >= 900
  asm volatile(
      "st.async.shared::cluster.mbarrier::complete_tx::bytes.v2.f32 [%0],{%2,%3},[%1];" ::"r"(cluster_address(p, rank)),
      "r"(cluster_address(mbarrier, rank)), "f"(v.x), "f"(v.y)
      : "memory");
#endif
}
__device__ __forceinline__ void store_async(float4* p, uint64_t* mbarrier, int rank, float4 v) {
#if __CUDA_ARCH__ >= 900
  asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [%0],{%2,%3,%4,%5},[%1];" ::"r"(
                   cluster_address(p, rank)),
               "r"(cluster_address(mbarrier, rank)), "f"(v.x), "f"(v.y), "f"(v.z), "f"(v.w)
               : "memory");
#endif
}

}  // namespace edgellm::kernels
