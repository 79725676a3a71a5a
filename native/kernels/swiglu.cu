// SwiGLU (or GeGLU) of a prompt's gate and up, to bf16 or, a row at a time, to E4M3.
#include <cassert>

#include "block_reduce.cuh"
#include "edgellm/kernels/swiglu.hpp"
#include "launch.hpp"

namespace edgellm::kernels {

namespace {

constexpr int kThreads = kBlockThreads;

// Eight columns of activation(gate) * up, as bf16 pairs.
__device__ __forceinline__ uint4 swiglu_eight(const SwigluArgs& p, std::size_t token, int column, float row_scale) {
  const bf16* row = p.gate_up + token * 2 * p.width + column;
  float gate[8], up[8];
  const uint4 gate_words = load_activation(row), up_words = load_activation(row + p.width);
  unpack_bf16(gate_words, gate);
  unpack_bf16(up_words, up);
  if (p.scales.columns) {
    float gate_scales[8], up_scales[8];
    load_eight_constants(p.scales.columns + column, gate_scales);
    load_eight_constants(p.scales.columns + p.width + column, up_scales);
#pragma unroll
    for (int j = 0; j < 8; j++) gate[j] *= row_scale * gate_scales[j], up[j] *= row_scale * up_scales[j];
  }
  if (p.bias) {
    float gate_bias[8], up_bias[8];
    load_eight_constants(p.bias + column, gate_bias);
    load_eight_constants(p.bias + p.width + column, up_bias);
#pragma unroll
    for (int j = 0; j < 8; j++) gate[j] += gate_bias[j], up[j] += up_bias[j];
  }
  uint32_t words[4];
#pragma unroll
  for (int j = 0; j < 8; j++) gate[j] = gated(p.activation, gate[j], up[j]);
#pragma unroll
  for (int j = 0; j < 4; j++) words[j] = pack_bf16(gate[2 * j], gate[2 * j + 1]);
  return make_uint4(words[0], words[1], words[2], words[3]);
}

__global__ void __launch_bounds__(kThreads) swiglu_kernel(const SwigluArgs p) {
  start_dependents();
  wait_for_predecessor();
  const int column = static_cast<int>(blockIdx.y * kThreads + threadIdx.x) * 8;
  if (column >= p.width) return;
  const std::size_t token = blockIdx.x;
  const float row_scale = p.scales.rows ? __ldcg(p.scales.rows + token) : 1.0f;
  *reinterpret_cast<uint4*>(p.out + token * p.width + column) = swiglu_eight(p, token, column, row_scale);
}

// A block a token: its row waits in shared memory for the scale.
__global__ void __launch_bounds__(kThreads) swiglu_fp8_kernel(const SwigluArgs p) {
  extern __shared__ uint4 activated[];  // (width / 8)
  start_dependents();
  wait_for_predecessor();
  const std::size_t token = blockIdx.x;
  const float row_scale = p.scales.rows ? __ldcg(p.scales.rows + token) : 1.0f;
  const int num_vectors = p.width / 8;
  float largest = 0.0f;
  for (int i = threadIdx.x; i < num_vectors; i += kThreads) {
    const uint4 words = swiglu_eight(p, token, i * 8, row_scale);
    activated[i] = words;  // read by this thread alone
    float values[8];
    unpack_bf16(words, values);
#pragma unroll
    for (int j = 0; j < 8; j++) largest = fmaxf(largest, fabsf(values[j]));
  }
  largest = block_max(largest);  // and every thread has read the old row scale, which may lie where the new one goes
  const float to_fp8 = largest > 0.0f ? kLargestFp8 / largest : 1.0f;
  for (int i = threadIdx.x; i < num_vectors; i += kThreads) {
    float v[8];
    unpack_bf16(activated[i], v);
#pragma unroll
    for (int j = 0; j < 8; j++) v[j] *= to_fp8;
    *reinterpret_cast<uint2*>(p.out_fp8 + token * p.width + i * 8) =
        make_uint2(pack_fp8(make_float4(v[0], v[1], v[2], v[3])), pack_fp8(make_float4(v[4], v[5], v[6], v[7])));
  }
  if (threadIdx.x == 0) p.out_scales[token] = largest > 0.0f ? largest / kLargestFp8 : 1.0f;
}

}  // namespace

void swiglu_async(const SwigluArgs& args, cudaStream_t stream, bool pdl) {
  assert(args.width % 8 == 0);
  if (args.out) {
    const dim3 grid(args.num_tokens, ceil_div(args.width, 8 * kThreads));
    return launch(swiglu_kernel, grid, dim3(kThreads), 0, stream, pdl, args);
  }
  assert(args.width <= kMaxFp8Width);
  const std::size_t bytes = static_cast<std::size_t>(args.width) * sizeof(bf16);
  EDGELLM_CUDA_TRY(cudaFuncSetAttribute(swiglu_fp8_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                        kMaxFp8Width * static_cast<int>(sizeof(bf16))));
  launch(swiglu_fp8_kernel, dim3(args.num_tokens), dim3(kThreads), bytes, stream, pdl, args);
}

}  // namespace edgellm::kernels
