// Copies from global into shared memory, in groups that a lane waits for in their order: cp.async (PTX ISA).
#pragma once

#include "device.cuh"

namespace edgellm::kernels {

// Zeros where not `inside`; then nothing is read. Not through L1.
__device__ __forceinline__ void copy_async16(uint32_t to, const void* from, bool inside) {
  asm volatile("cp.async.cg.shared.global [%0],[%1],16,%2;" ::"r"(to), "l"(from), "r"(inside ? 16 : 0) : "memory");
}
__device__ __forceinline__ void copy_async16(void* shared, const void* global, bool inside) {
  copy_async16(shared_address(shared), global, inside);
}
// The same of weights, a line at a time as load_once has them.
__device__ __forceinline__ void copy_weights16(uint32_t to, const void* from, bool inside) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0],[%1],16,%2;" ::"r"(to), "l"(from), "r"(inside ? 16 : 0)
               : "memory");
}
__device__ __forceinline__ void copy_scales4(uint32_t to, const void* from, bool inside) {
  asm volatile("cp.async.ca.shared.global [%0],[%1],4,%2;" ::"r"(to), "l"(from), "r"(inside ? 4 : 0) : "memory");
}
__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Until all of the lane's groups but the last kLeft have come. Others' copies are not waited for.
template <int kLeft>
__device__ __forceinline__ void wait_for_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kLeft) : "memory");
}
__device__ __forceinline__ uint4 load_shared16(uint32_t from) {
  uint4 v;
  asm volatile("ld.shared.v4.u32 {%0,%1,%2,%3},[%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "r"(from)
               : "memory");
  return v;
}
__device__ __forceinline__ uint32_t load_shared4(uint32_t from) {
  uint32_t v;
  asm volatile("ld.shared.u32 %0,[%1];" : "=r"(v) : "r"(from) : "memory");
  return v;
}

}  // namespace edgellm::kernels
