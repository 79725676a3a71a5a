// bf16 to fp32, with a bias.
#include <cassert>

#include "device.cuh"
#include "edgellm/kernels/widen.hpp"
#include "launch.hpp"

namespace edgellm::kernels {

namespace {

constexpr int kThreads = 256;

// Eight columns of a token a thread.
__global__ void __launch_bounds__(kThreads) widen_kernel(const bf16* y, const float* bias, float* out, int width) {
  start_dependents();
  const int column = static_cast<int>(blockIdx.x * kThreads + threadIdx.x) * 8;
  float added[8] = {};
  if (bias && column < width) {
#pragma unroll
    for (int i = 0; i < 8; i++) added[i] = __ldg(bias + column + i);
  }
  wait_for_predecessor();
  if (column >= width) return;
  const std::size_t at = static_cast<std::size_t>(blockIdx.y) * width + column;
  float v[8];
  unpack_bf16(load_activation(y + at), v);
#pragma unroll
  for (int i = 0; i < 8; i++) v[i] += added[i];
  *reinterpret_cast<float4*>(out + at) = make_float4(v[0], v[1], v[2], v[3]);
  *reinterpret_cast<float4*>(out + at + 4) = make_float4(v[4], v[5], v[6], v[7]);
}

}  // namespace

void widen_async(const bf16* y, const float* bias, float* out, int num_tokens, int width, cudaStream_t stream,
                 bool pdl) {
  assert(width % 8 == 0);
  const dim3 grid(static_cast<unsigned>(ceil_div(width / 8, kThreads)), static_cast<unsigned>(num_tokens));
  launch(widen_kernel, grid, dim3(kThreads), 0, stream, pdl, y, bias, out, width);
}

}  // namespace edgellm::kernels
