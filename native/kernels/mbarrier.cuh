// Barriers in shared memory that count bytes as they arrive (compute capability 9.0), and the copy that counts on them.
//
// PTX ISA, mbarrier and cp.async.bulk. Each serves once. Without them the functions do nothing.
#pragma once

#include "device.cuh"

namespace edgellm::kernels {

// By one thread, before its block or its cluster meets at a barrier.
__device__ __forceinline__ void mbarrier_init(uint64_t* mbarrier) {
#if __CUDA_ARCH__ >= 900
  asm volatile(
      "mbarrier.init.shared::cta.b64 [%0],1;\nfence.mbarrier_init.release.cluster;" ::"r"(shared_address(mbarrier))
      : "memory");
#endif
}
// By the same thread: how many bytes are to come.
__device__ __forceinline__ void mbarrier_expect(uint64_t* mbarrier, int num_bytes) {
#if __CUDA_ARCH__ >= 900
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _,[%0],%1;" ::"r"(shared_address(mbarrier)), "r"(num_bytes)
               : "memory");
#endif
}
// After that: a copy into shared memory that no lane waits for. Both places are 16-byte aligned, and so is the size.
__device__ __forceinline__ void copy_bulk(void* shared, const void* global, int num_bytes, uint64_t* mbarrier) {
#if __CUDA_ARCH__ >= 900
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0],[%1],%2,[%3];" ::"r"(
                   shared_address(shared)),
               "l"(global), "r"(num_bytes), "r"(shared_address(mbarrier))
               : "memory");
#endif
}
// Until they have come. Nothing is on its way to this block then, so that it may leave.
__device__ __forceinline__ void mbarrier_wait(uint64_t* mbarrier) {
#if __CUDA_ARCH__ >= 900
  asm volatile(
      "{\n.reg .pred done;\nagain:\n"
      "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 done,[%0],0;\n@!done bra again;\n}" ::"r"(
          shared_address(mbarrier))
      : "memory");
#endif
}

}  // namespace edgellm::kernels
