// RMSNorm, residual addition, SwiGLU and row gathering: memory-bound kernels between prefill's matrix products.
#include <cassert>

#include "device.cuh"
#include "edgellm/kernels/elementwise.hpp"
#include "launch.hpp"

namespace edgellm::kernels {

namespace {

constexpr int kThreads = 256;

__device__ __forceinline__ float block_sum(float v) {
  __shared__ float partial[kThreads / 32];
  v = warp_sum(v);
  if ((threadIdx.x & 31) == 0) partial[threadIdx.x / 32] = v;
  __syncthreads();
  float sum = 0.0f;
#pragma unroll
  for (int i = 0; i < kThreads / 32; i++) sum += partial[i];
  return sum;
}

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

__global__ void __launch_bounds__(kThreads) residual_norm_kernel(const ResidualNormArgs p) {
  start_dependents();
  wait_for_predecessor();
  const std::size_t at = static_cast<std::size_t>(blockIdx.x) * p.hidden;
  float squares = 0.0f;
  for (int i = threadIdx.x * 2; i < p.hidden; i += kThreads * 2) {
    const float2 delta = __bfloat1622float2(*reinterpret_cast<const bf16x2*>(p.delta + at + i));
    float2 v = *reinterpret_cast<const float2*>(p.residual + at + i);
    v.x += delta.x, v.y += delta.y;
    if (p.bias) v.x += p.bias[i], v.y += p.bias[i + 1];
    *reinterpret_cast<float2*>(p.residual + at + i) = v;
    if (p.residual_bf16) *reinterpret_cast<uint32_t*>(p.residual_bf16 + at + i) = pack_bf16(v.x, v.y);
    squares = fmaf(v.x, v.x, fmaf(v.y, v.y, squares));
  }
  if (!p.gain) return;
  const float inverse = rsqrtf(block_sum(squares) / static_cast<float>(p.hidden) + p.eps);
  for (int i = threadIdx.x * 2; i < p.hidden; i += kThreads * 2) {  // the elements this thread wrote
    const float2 v = *reinterpret_cast<const float2*>(p.residual + at + i);
    const float2 gain = __bfloat1622float2(*reinterpret_cast<const bf16x2*>(p.gain + i));
    *reinterpret_cast<uint32_t*>(p.normed + at + i) = pack_bf16(v.x * inverse * gain.x, v.y * inverse * gain.y);
  }
}

__global__ void __launch_bounds__(kThreads)
    swiglu_kernel(const bf16* gate_up, const float* bias, int width, std::size_t count, bf16* out) {
  start_dependents();
  wait_for_predecessor();
  const std::size_t i = (static_cast<std::size_t>(blockIdx.x) * kThreads + threadIdx.x) * 8;
  if (i >= count) return;
  const std::size_t token = i / width, column = i % width;
  const bf16* row = gate_up + token * 2 * width + column;
  float gate[8], up[8];
  unpack_bf16(load_activation(row), gate);
  unpack_bf16(load_activation(row + width), up);
  uint32_t words[4];
#pragma unroll
  for (int j = 0; j < 8; j++) {
    if (bias) gate[j] += bias[column + j], up[j] += bias[width + column + j];
    gate[j] = gate[j] / (1.0f + __expf(-gate[j])) * up[j];
  }
#pragma unroll
  for (int j = 0; j < 4; j++) words[j] = pack_bf16(gate[2 * j], gate[2 * j + 1]);
  *reinterpret_cast<uint4*>(out + i) = make_uint4(words[0], words[1], words[2], words[3]);
}

__global__ void __launch_bounds__(kThreads)
    gather_rows_kernel(const bf16* x, const int32_t* rows, int hidden, bf16* out) {
  start_dependents();
  wait_for_predecessor();
  const int row = *static_cast<const volatile int32_t*>(rows + blockIdx.x);
  for (int i = threadIdx.x * 8; i < hidden; i += kThreads * 8) {
    const uint4 v = row < 0 ? make_uint4(0, 0, 0, 0) : load_activation(x + static_cast<std::size_t>(row) * hidden + i);
    *reinterpret_cast<uint4*>(out + static_cast<std::size_t>(blockIdx.x) * hidden + i) = v;
  }
}

}  // namespace

void rms_norm_async(const float* x, const bf16* gain, float eps, int num_tokens, int hidden, bf16* out,
                    cudaStream_t stream, bool pdl) {
  launch(rms_norm_kernel, dim3(num_tokens), dim3(kThreads), 0, stream, pdl, x, gain, eps, hidden, out);
}

void residual_norm_async(const ResidualNormArgs& args, cudaStream_t stream, bool pdl) {
  assert(args.hidden % 2 == 0);
  launch(residual_norm_kernel, dim3(args.num_tokens), dim3(kThreads), 0, stream, pdl, args);
}

void swiglu_async(const bf16* gate_up, const float* bias, int num_tokens, int width, bf16* out, cudaStream_t stream,
                  bool pdl) {
  assert(width % 8 == 0);
  const std::size_t count = static_cast<std::size_t>(num_tokens) * width;
  launch(swiglu_kernel, dim3(static_cast<unsigned>((count / 8 + kThreads - 1) / kThreads)), dim3(kThreads), 0, stream,
         pdl, gate_up, bias, width, count, out);
}

void gather_rows_async(const bf16* x, const int32_t* rows, int num_rows, int hidden, bf16* out, cudaStream_t stream,
                       bool pdl) {
  assert(hidden % 8 == 0);
  launch(gather_rows_kernel, dim3(num_rows), dim3(kThreads), 0, stream, pdl, x, rows, hidden, out);
}

}  // namespace edgellm::kernels
