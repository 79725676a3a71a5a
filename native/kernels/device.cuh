// What the kernels share on the device: programmatic dependent launch, loads with a cache policy, number formats.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>

#include <cstdint>
#include <cstring>

#include "edgellm/kernels/types.hpp"

namespace edgellm::kernels {

using bf16 = __nv_bfloat16;
using bf16x2 = __nv_bfloat162;

constexpr unsigned kAllLanes = 0xffffffffu;

__host__ __device__ constexpr int ceil_div(int a, int b) { return (a + b - 1) / b; }

// The predecessor's results are visible after this. Every kernel calls it in every thread, also when it needs nothing
// from the predecessor: only then does "my predecessor is complete" mean that all earlier kernels are.
__device__ __forceinline__ void wait_for_predecessor() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// Lets the next kernel's blocks start as soon as there is room, to load what does not depend on this one.
__device__ __forceinline__ void start_dependents() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// As PTX takes what lies in shared memory.
__device__ __forceinline__ uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

// Weights are read once: they must not push activations out of L1. L2 fetches a line whole, but no more of it: warps
// ask for all lines of a row anyway, and two of them at a time cost 2 to 5 % of a step on an H200.
__device__ __forceinline__ uint4 load_once(const void* p) {
  uint4 v;
  asm volatile("ld.global.nc.L1::no_allocate.L2::128B.v4.u32 {%0,%1,%2,%3},[%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(p));
  return v;
}

// Constant over the life of the weights, shared by blocks.
__device__ __forceinline__ uint4 load_constant(const void* p) {
  uint4 v;
  asm volatile("ld.global.nc.v4.u32 {%0,%1,%2,%3},[%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(p));
  return v;
}

// Eight neighbouring floats that no kernel writes; 16-byte aligned.
__device__ __forceinline__ void load_eight_constants(const float* p, float* v) {
#pragma unroll
  for (int i = 0; i < 8; i += 4) {
    const float4 four = __ldg(reinterpret_cast<const float4*>(p + i));
    v[i] = four.x, v[i + 1] = four.y, v[i + 2] = four.z, v[i + 3] = four.w;
  }
}

// Written by the predecessor: volatile, so that the compiler does not move it above wait_for_predecessor.
__device__ __forceinline__ uint4 load_activation(const void* p) {
  uint4 v;
  asm volatile("ld.global.v4.u32 {%0,%1,%2,%3},[%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(p) : "memory");
  return v;
}
__device__ __forceinline__ uint2 load_activation8(const void* p) {
  uint2 v;
  asm volatile("ld.global.v2.u32 {%0,%1},[%2];" : "=r"(v.x), "=r"(v.y) : "l"(p) : "memory");
  return v;
}
// From L2: a cache line that this SM may hold from before the predecessor ran.
__device__ __forceinline__ uint4 load_l2(const void* p) {
  uint4 v;
  asm volatile("ld.global.cg.v4.u32 {%0,%1,%2,%3},[%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(p)
               : "memory");
  return v;
}
__device__ __forceinline__ float load_l2(const float* p) { return __ldcg(p); }

__device__ __forceinline__ float low_float(uint32_t two_bf16) { return __uint_as_float(two_bf16 << 16); }
__device__ __forceinline__ float high_float(uint32_t two_bf16) { return __uint_as_float(two_bf16 & 0xffff0000u); }

__device__ __forceinline__ void unpack_bf16(const uint4& v, float* out) {  // out[8]
  out[0] = low_float(v.x), out[1] = high_float(v.x), out[2] = low_float(v.y), out[3] = high_float(v.y);
  out[4] = low_float(v.z), out[5] = high_float(v.z), out[6] = low_float(v.w), out[7] = high_float(v.w);
}

// As one store, which the compiler does not always make of a struct's.
__device__ __forceinline__ void store_whole(void* p, const uint4& v) {
  asm volatile("st.global.v4.u32 [%0],{%1,%2,%3,%4};" ::"l"(p), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w) : "memory");
}
__device__ __forceinline__ void store_whole(void* p, const uint2& v) {
  asm volatile("st.global.v2.u32 [%0],{%1,%2};" ::"l"(p), "r"(v.x), "r"(v.y) : "memory");
}

template <class To, class From>
__device__ __forceinline__ To bits_as(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  memcpy(&to, &from, sizeof(To));
  return to;
}

__device__ __forceinline__ uint32_t pack_bf16(float low, float high) {
  return bits_as<uint32_t>(__floats2bfloat162_rn(low, high));
}
__device__ __forceinline__ uint32_t pack_fp16(float low, float high) {
  return bits_as<uint32_t>(__floats2half2_rn(low, high));
}
__device__ __forceinline__ uint32_t pack_fp8(const float4& v) {
  const uint32_t low = __nv_cvt_float2_to_fp8x2(make_float2(v.x, v.y), __NV_SATFINITE, __NV_E4M3);
  const uint32_t high = __nv_cvt_float2_to_fp8x2(make_float2(v.z, v.w), __NV_SATFINITE, __NV_E4M3);
  return low | high << 16;
}
__device__ __forceinline__ float2 unpack_fp16(uint32_t two) { return __half22float2(bits_as<half2>(two)); }

// Two E4M3 numbers (the low 16 bits) as two fp16, times kFp8ToFp16: exact. Without the instruction, the bits are moved
// to fp16's fields, which leaves the exponents 8 too low.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 890
constexpr float kFp8ToFp16 = 1.0f / 256.0f;
#else
constexpr float kFp8ToFp16 = 1.0f;
#endif
__device__ __forceinline__ uint32_t fp8x2_to_fp16x2(uint32_t two) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 890
  const uint32_t spread = __byte_perm(two, 0, 0x1404);  // each number in the upper byte of a half
  return (spread & 0x80008000u) | ((spread >> 1) & 0x3f803f80u);
#else
  const __half2_raw raw = __nv_cvt_fp8x2_to_halfraw2(static_cast<__nv_fp8x2_storage_t>(two & 0xffff), __NV_E4M3);
  return bits_as<uint32_t>(raw);
#endif
}

// Two signed bytes of `four` (bytes 0 and 1, or 2 and 3) as two fp16: exact. `four` is already xor 0x80808080.
template <int kUpper>
__device__ __forceinline__ uint32_t int8x2_to_fp16x2(uint32_t four_biased) {
  // 0x64uu is 1024 + uu.
  const uint32_t magic = __byte_perm(four_biased, 0x64646464u, kUpper ? 0x4342 : 0x4140);
  return bits_as<uint32_t>(__hsub2(bits_as<half2>(magic), bits_as<half2>(0x64806480u)));  // 1152
}

// Nibbles j of the low and the high half of `word`, less 8, as two bf16: 0x4300 + u is 128 + u.
__device__ __forceinline__ uint32_t int4x2_to_bf16x2(uint32_t word, int j) {
  uint32_t magic;
  asm("lop3.b32 %0,%1,0x000f000f,0x43004300,0xEA;" : "=r"(magic) : "r"(word >> (4 * j)));
  return bits_as<uint32_t>(__hsub2(bits_as<bf16x2>(magic), bits_as<bf16x2>(0x43084308u)));  // 136
}

// activation(gate) * up: both activations are the gate times a sigmoid, GELU's of 2 sqrt(2 / pi) (x + 0.044715 x^3).
__device__ __forceinline__ float gated(Activation activation, float gate, float up) {
  float exponent = gate;
  if (activation == Activation::gelu_tanh) exponent = gate * fmaf(0.07135481f * gate, gate, 1.5957691f);
  return __fdividef(gate, 1.0f + __expf(-exponent)) * up;
}

// Of the thread's warp, in a form by which the compiler knows that all lanes have the same.
__device__ __forceinline__ int warp_index() { return __shfl_sync(kAllLanes, static_cast<int>(threadIdx.x >> 5), 0); }

// Sum over a warp, in every lane.
__device__ __forceinline__ float warp_sum(float v) {
#pragma unroll
  for (int s = 16; s >= 1; s >>= 1) v += __shfl_xor_sync(kAllLanes, v, s);
  return v;
}
__device__ __forceinline__ float warp_max(float v) {
#pragma unroll
  for (int s = 16; s >= 1; s >>= 1) v = fmaxf(v, __shfl_xor_sync(kAllLanes, v, s));
  return v;
}

// Sums of N values (a power of two up to 32) over a warp with 31 shuffles at most: afterwards v[0] of a lane is the
// total of value lane / (32 / N).
template <int N, int kStride = 16>
__device__ __forceinline__ void warp_sums(float* v, int lane) {
  if constexpr (N > 1) {
    const bool upper = lane & kStride;
#pragma unroll
    for (int i = 0; i < N / 2; i++) {
      const float send = upper ? v[i] : v[i + N / 2];
      const float keep = upper ? v[i + N / 2] : v[i];
      v[i] = keep + __shfl_xor_sync(kAllLanes, send, kStride);
    }
    warp_sums<N / 2, kStride / 2>(v, lane);
  } else if constexpr (kStride >= 1) {
    v[0] += __shfl_xor_sync(kAllLanes, v[0], kStride);
    warp_sums<1, kStride / 2>(v, lane);
  }
}

// Tensor-core products, D += A (16 x 16, row) B (16 x 8, col): PTX ISA, mma.m16n8k16.
__device__ __forceinline__ void mma_bf16(float* d, const uint32_t* a, uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
__device__ __forceinline__ void mma_fp16(float* d, const uint32_t* a, uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// A key ordered as the value, then by falling index; the largest key is the first largest value. Never 0.
__device__ __forceinline__ unsigned long long max_key(float value, uint32_t index) {
  uint32_t bits = __float_as_uint(value + 0.0f);  // -0 is 0
  bits = (bits & 0x80000000u) ? ~bits : (bits | 0x80000000u);
  return (static_cast<unsigned long long>(bits) << 32) | (0xffffffffu - index);
}
__device__ __forceinline__ uint32_t key_index(unsigned long long key) {
  return 0xffffffffu - static_cast<uint32_t>(key);
}
__device__ __forceinline__ unsigned long long larger(unsigned long long a, unsigned long long b) {
  return a > b ? a : b;
}

}  // namespace edgellm::kernels
