// How keys and values are stored in the cache, eight at a time.
#pragma once

#include "device.cuh"
#include "edgellm/kernels/types.hpp"

namespace edgellm::kernels {

template <KvFormat F>
struct Kv;

template <>
struct Kv<KvFormat::bf16> {
  using Element = bf16;
  using Eight = uint4;
  static __device__ __forceinline__ Element from_float(float v) { return __float2bfloat16(v); }
  static __device__ __forceinline__ Eight load(const Element* p) { return load_l2(static_cast<const void*>(p)); }
  static __device__ __forceinline__ Eight zeros() { return make_uint4(0, 0, 0, 0); }
  static __device__ __forceinline__ void unpack(const Eight& v, float* out) { unpack_bf16(v, out); }
  static __device__ __forceinline__ Eight pack(const float* v) {
    return make_uint4(pack_bf16(v[0], v[1]), pack_bf16(v[2], v[3]), pack_bf16(v[4], v[5]), pack_bf16(v[6], v[7]));
  }
};

template <>
struct Kv<KvFormat::fp16> {
  using Element = __half;
  using Eight = uint4;
  static __device__ __forceinline__ Element from_float(float v) {
    return __float2half_rn(fabsf(v) > 65504.0f ? copysignf(65504.0f, v) : v);  // NaN stays NaN
  }
  static __device__ __forceinline__ Eight load(const Element* p) { return load_l2(static_cast<const void*>(p)); }
  static __device__ __forceinline__ Eight zeros() { return make_uint4(0, 0, 0, 0); }
  static __device__ __forceinline__ void unpack(const Eight& v, float* out) {
    const uint32_t words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const float2 two = unpack_fp16(words[i]);
      out[2 * i] = two.x, out[2 * i + 1] = two.y;
    }
  }
  static __device__ __forceinline__ Eight pack(const float* v) {
    uint32_t words[4];
#pragma unroll
    for (int i = 0; i < 4; i++) {
      words[i] = bits_as<uint32_t>(__halves2half2(from_float(v[2 * i]), from_float(v[2 * i + 1])));
    }
    return make_uint4(words[0], words[1], words[2], words[3]);
  }
};

template <>
struct Kv<KvFormat::fp8> {
  using Element = uint8_t;
  using Eight = uint2;
  static __device__ __forceinline__ Element from_float(float v) {
    return __nv_cvt_float_to_fp8(v, __NV_SATFINITE, __NV_E4M3);
  }
  static __device__ __forceinline__ Eight load(const Element* p) {
    Eight v;
    asm volatile("ld.global.cg.v2.u32 {%0,%1},[%2];" : "=r"(v.x), "=r"(v.y) : "l"(p) : "memory");
    return v;
  }
  static __device__ __forceinline__ Eight zeros() { return make_uint2(0, 0); }
  static __device__ __forceinline__ void unpack(const Eight& v, float* out) {
    const uint32_t words[2] = {v.x, v.y};
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const float2 two = unpack_fp16(fp8x2_to_fp16x2(words[i / 2] >> (16 * (i & 1))));
      out[2 * i] = two.x * (1.0f / kFp8ToFp16), out[2 * i + 1] = two.y * (1.0f / kFp8ToFp16);
    }
  }
  static __device__ __forceinline__ Eight pack(const float* v) {
    return make_uint2(pack_fp8(make_float4(v[0], v[1], v[2], v[3])), pack_fp8(make_float4(v[4], v[5], v[6], v[7])));
  }
};

}  // namespace edgellm::kernels
