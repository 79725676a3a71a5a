// h = A x for LoRA: a block a row of A and token, whose loads of the row precede the wait for x.
#include <cassert>

#include "launch.hpp"
#include "lora.cuh"

namespace edgellm::kernels {

namespace {

constexpr int kThreads = 256;
constexpr int kDepth = 4;  // 16-byte loads of A, and as many of x, in flight a thread: 8,192 input features a block
constexpr int kLine = 64;  // bf16 in a cache line

__device__ __forceinline__ void prefetch_l2(const void* p) { asm volatile("prefetch.global.L2 [%0];" ::"l"(p)); }

__global__ void __launch_bounds__(kThreads) lora_down_kernel(const LoraDownArgs p) {
  __shared__ float partial[kThreads / 32][2];
  const int row = blockIdx.x, token = blockIdx.y, tid = threadIdx.x, lane = tid & 31, warp = tid >> 5;
  const int chunks = p.cols / 8;
  // Which adapter a token has, and the adapters themselves, do not change while kernels run: they need no waiting.
  const int adapter = __ldg(p.lora.adapters + token);
  LoraLinear linear;
  const bf16* a = nullptr;
  if (adapter != 0 && row < p.lora.linears[adapter - 1].num_a_rows) {
    linear = p.lora.linears[adapter - 1];
    a = linear.a + static_cast<std::size_t>(row) * p.cols;
  }
  uint4 w[kDepth];
#pragma unroll
  for (int d = 0; d < kDepth; d++) {
    const int chunk = d * kThreads + tid;
    w[d] = a && chunk < chunks ? load_constant(a + chunk * 8) : make_uint4(0, 0, 0, 0);
  }
  if (a) {
    // This block's share of B: the GEMV's blocks then end without a wait for memory.
    const int lines = ceil_div(linear.num_b, kLine), share = ceil_div(lines, linear.num_a_rows);
    const int last = min(lines, (row + 1) * share);
    for (int line = row * share + tid; line < last; line += kThreads) prefetch_l2(linear.b + line * kLine);
  }
  start_dependents();
  wait_for_predecessor();
  if (!a) return;

  const bf16* x = p.x + static_cast<std::size_t>(token) * p.cols;
  float sum = 0.0f, squares = 0.0f;
  for (int first = 0; first < chunks; first += kThreads * kDepth) {
    uint4 x8[kDepth];
#pragma unroll
    for (int d = 0; d < kDepth; d++) {
      const int chunk = first + d * kThreads + tid;
      const bool inside = chunk < chunks;
      x8[d] = inside ? load_activation(x + chunk * 8) : make_uint4(0, 0, 0, 0);
      if (first > 0) w[d] = inside ? load_constant(a + chunk * 8) : make_uint4(0, 0, 0, 0);
    }
#pragma unroll
    for (int d = 0; d < kDepth; d++) {
      const int chunk = first + d * kThreads + tid;
      float xs[8], weights[8];
      unpack_bf16(x8[d], xs);
      if (p.gain && chunk < chunks) {
        float gains[8];
        unpack_bf16(load_constant(p.gain + chunk * 8), gains);
#pragma unroll
        for (int j = 0; j < 8; j++) {
          squares = fmaf(xs[j], xs[j], squares);
          xs[j] *= gains[j];
        }
      }
      unpack_bf16(w[d], weights);
#pragma unroll
      for (int j = 0; j < 8; j++) sum = fmaf(weights[j], xs[j], sum);
    }
  }
  sum = warp_sum(sum);
  squares = warp_sum(squares);
  if (lane == 0) partial[warp][0] = sum, partial[warp][1] = squares;
  __syncthreads();
  if (tid != 0) return;
  sum = squares = 0.0f;
#pragma unroll
  for (int i = 0; i < kThreads / 32; i++) sum += partial[i][0], squares += partial[i][1];
  if (p.gain) sum *= rsqrtf(squares / static_cast<float>(p.cols) + p.norm_eps);
  p.lora.h[static_cast<std::size_t>(token) * p.lora.h_stride + row] = sum;
}

}  // namespace

void lora_down_async(const LoraDownArgs& args, cudaStream_t stream, bool pdl) {
  assert(args.cols % 8 == 0 && args.lora.h_stride % 4 == 0);
  if (args.lora.h_stride == 0) return;
  // The ranks are known to the device only: there is a block for every row that any adapter may have.
  launch(lora_down_kernel, dim3(args.lora.h_stride, args.num_tokens), dim3(kThreads), 0, stream, pdl, args);
}

}  // namespace edgellm::kernels
