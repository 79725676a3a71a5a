// RMSNorm, and the step from one matrix product to the next: a residual addition with the norm of the sum.
#include <cassert>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "block_reduce.cuh"
#include "edgellm/kernels/rms_norm.hpp"
#include "launch.hpp"

namespace edgellm::kernels {

namespace {

constexpr int kThreads = kBlockThreads;

// A block a token. The row is read a second time for the division: from L1, where it just was.
__global__ void __launch_bounds__(kThreads)
    rms_norm_kernel(const float* x, const bf16* gain, float eps, int hidden, bf16* out) {
  start_dependents();
  wait_for_predecessor();
  const std::size_t at = static_cast<std::size_t>(blockIdx.x) * hidden;
  float squares = 0.0f;
  for (int i = threadIdx.x; i < hidden; i += kThreads) squares = fmaf(x[at + i], x[at + i], squares);
  const float inverse = rsqrtf(block_sum(squares) / static_cast<float>(hidden) + eps);
  for (int i = threadIdx.x; i < hidden; i += kThreads) {
    out[at + i] = __float2bfloat16(x[at + i] * inverse * __bfloat162float(gain[i]));
  }
}

__device__ __forceinline__ float4 load_float4(const float* p) {
  return bits_as<float4>(load_activation(static_cast<const void*>(p)));
}
__device__ __forceinline__ float largest_of(const float4& v) {
  return fmaxf(fmaxf(fabsf(v.x), fabsf(v.y)), fmaxf(fabsf(v.z), fabsf(v.w)));
}

// Four elements of delta, times the factors its product left out, plus the bias.
__device__ __forceinline__ float4 full_delta(const ResidualNormArgs& p, float4 v, int column, float row_scale) {
  if (p.scales.columns) {
    const float4 scale = *reinterpret_cast<const float4*>(p.scales.columns + column);
    v.x *= row_scale * scale.x, v.y *= row_scale * scale.y, v.z *= row_scale * scale.z, v.w *= row_scale * scale.w;
  }
  if (p.bias) {
    const float4 bias = *reinterpret_cast<const float4*>(p.bias + column);
    v.x += bias.x, v.y += bias.y, v.z += bias.z, v.w += bias.w;
  }
  return v;
}

__device__ __forceinline__ float4 unpack_four(const uint2& two) {
  return make_float4(low_float(two.x), high_float(two.x), low_float(two.y), high_float(two.y));
}

__device__ __forceinline__ float squares_of(const float4& v) {
  return fmaf(v.x, v.x, fmaf(v.y, v.y, fmaf(v.z, v.z, v.w * v.w)));
}

__device__ __forceinline__ float4 normed_four(const float4& v, const bf16* gain, float inverse) {
  const uint2 g = __ldg(reinterpret_cast<const uint2*>(gain));
  return make_float4(v.x * inverse * low_float(g.x), v.y * inverse * high_float(g.x), v.z * inverse * low_float(g.y),
                     v.w * inverse * high_float(g.y));
}

// A block a token, whose row stays in registers: kVectors times four elements a thread. With kDeltaNorm what is added
// is normed first.
template <int kVectors, bool kDeltaNorm>
__global__ void __launch_bounds__(kThreads) residual_norm_kernel(const ResidualNormArgs p) {
  start_dependents();
  wait_for_predecessor();
  const std::size_t row = static_cast<std::size_t>(blockIdx.x) * p.hidden;
  const float row_scale = p.scales.rows ? __ldcg(p.scales.rows + blockIdx.x) : 1.0f;
  float4 v[kVectors];
  std::conditional_t<kDeltaNorm, float4, uint2> deltas[kVectors];
  float squares = 0.0f;
#pragma unroll
  for (int k = 0; k < kVectors; k++) {  // all loads are under way before the first store
    const int column = (k * kThreads + static_cast<int>(threadIdx.x)) * 4;
    if (column >= p.hidden) continue;
    v[k] = load_float4(p.residual + row + column);
    if constexpr (kDeltaNorm) {
      deltas[k] =
          p.delta_f32 ? load_float4(p.delta_f32 + row + column) : unpack_four(load_activation8(p.delta + row + column));
    } else {
      deltas[k] = load_activation8(p.delta + row + column);
    }
  }
  if constexpr (kDeltaNorm) {
    float delta_squares = 0.0f;
#pragma unroll
    for (int k = 0; k < kVectors; k++) {
      const int column = (k * kThreads + static_cast<int>(threadIdx.x)) * 4;
      if (column >= p.hidden) continue;
      deltas[k] = full_delta(p, deltas[k], column, row_scale);
      delta_squares += squares_of(deltas[k]);
    }
    const float inverse = rsqrtf(block_sum<1>(delta_squares) / static_cast<float>(p.hidden) + p.eps);
#pragma unroll
    for (int k = 0; k < kVectors; k++) {
      const int column = (k * kThreads + static_cast<int>(threadIdx.x)) * 4;
      if (column < p.hidden) deltas[k] = normed_four(deltas[k], p.delta_gain + column, inverse);
    }
  }
#pragma unroll
  for (int k = 0; k < kVectors; k++) {
    const int column = (k * kThreads + static_cast<int>(threadIdx.x)) * 4;
    if (column >= p.hidden) continue;
    float4 delta;
    if constexpr (kDeltaNorm) {
      delta = deltas[k];
    } else {
      delta = full_delta(p, unpack_four(deltas[k]), column, row_scale);
    }
    v[k].x += delta.x, v[k].y += delta.y, v[k].z += delta.z, v[k].w += delta.w;
    *reinterpret_cast<float4*>(p.residual + row + column) = v[k];
    if (p.residual_bf16) {
      *reinterpret_cast<uint2*>(p.residual_bf16 + row + column) =
          make_uint2(pack_bf16(v[k].x, v[k].y), pack_bf16(v[k].z, v[k].w));
    }
    squares = fmaf(v[k].x, v[k].x, fmaf(v[k].y, v[k].y, fmaf(v[k].z, v[k].z, fmaf(v[k].w, v[k].w, squares))));
  }
  if (!p.gain) return;
  const float inverse = rsqrtf(block_sum(squares) / static_cast<float>(p.hidden) + p.eps);
  float largest = 0.0f;
#pragma unroll
  for (int k = 0; k < kVectors; k++) {
    const int column = (k * kThreads + static_cast<int>(threadIdx.x)) * 4;
    if (column >= p.hidden) continue;
    v[k] = normed_four(v[k], p.gain + column, inverse);
    if (p.normed) {
      *reinterpret_cast<uint2*>(p.normed + row + column) =
          make_uint2(pack_bf16(v[k].x, v[k].y), pack_bf16(v[k].z, v[k].w));
    }
    largest = fmaxf(largest, largest_of(v[k]));
  }
  if (!p.normed_fp8) return;
  largest = block_max(largest);
  const float to_fp8 = largest > 0.0f ? kLargestFp8 / largest : 1.0f;
#pragma unroll
  for (int k = 0; k < kVectors; k++) {
    const int column = (k * kThreads + static_cast<int>(threadIdx.x)) * 4;
    if (column >= p.hidden) continue;
    const float4 scaled = make_float4(v[k].x * to_fp8, v[k].y * to_fp8, v[k].z * to_fp8, v[k].w * to_fp8);
    *reinterpret_cast<uint32_t*>(p.normed_fp8 + row + column) = pack_fp8(scaled);
  }
  if (threadIdx.x == 0) p.normed_scales[blockIdx.x] = largest > 0.0f ? largest / kLargestFp8 : 1.0f;
}

}  // namespace

void rms_norm_async(const float* x, const bf16* gain, float eps, int num_tokens, int hidden, bf16* out,
                    cudaStream_t stream, bool pdl) {
  launch(rms_norm_kernel, dim3(num_tokens), dim3(kThreads), 0, stream, pdl, x, gain, eps, hidden, out);
}

void residual_norm_async(const ResidualNormArgs& args, cudaStream_t stream, bool pdl) {
  assert(args.hidden % 8 == 0);
  assert(args.delta || (args.delta_f32 && args.delta_gain && !args.scales.columns));
  const auto run = [&](auto plain, auto delta_norm) {
    launch(args.delta_gain ? delta_norm : plain, dim3(args.num_tokens), dim3(kThreads), 0, stream, pdl, args);
  };
  const int vectors = ceil_div(args.hidden, 4 * kThreads);
  if (vectors <= 1) return run(residual_norm_kernel<1, false>, residual_norm_kernel<1, true>);
  if (vectors <= 2) return run(residual_norm_kernel<2, false>, residual_norm_kernel<2, true>);
  if (vectors <= 4) return run(residual_norm_kernel<4, false>, residual_norm_kernel<4, true>);
  if (vectors <= 8) return run(residual_norm_kernel<8, false>, residual_norm_kernel<8, true>);
  static_assert(kMaxNormWidth == 16 * 4 * kThreads);
  if (vectors <= 16) return run(residual_norm_kernel<16, false>, residual_norm_kernel<16, true>);
  throw std::invalid_argument("rows of " + std::to_string(args.hidden) + " are too wide; the norm takes at most " +
                              std::to_string(kMaxNormWidth));
}

}  // namespace edgellm::kernels
