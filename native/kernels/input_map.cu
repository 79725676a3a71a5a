// Gathers and scales a layer's input: eight features a thread, written as 16 bytes, read one by one from the L2 cache.
#include <cassert>

#include "device.cuh"
#include "edgellm/kernels/input_map.hpp"
#include "launch.hpp"

namespace edgellm::kernels {

namespace {

constexpr int kThreads = 128;

__global__ void __launch_bounds__(kThreads) map_input_kernel(const InputMapArgs p) {
  const int column = static_cast<int>(blockIdx.y * kThreads + threadIdx.x) * 8;
  const bool inside = column < p.cols;
  // Constants first: they may be read before the predecessor has finished.
  int from[8];
  float factor[8];
#pragma unroll
  for (int i = 0; i < 8; i++) {
    from[i] = p.order && inside ? __ldg(p.order + column + i) : column + i;
    factor[i] = p.factor && inside ? __ldg(p.factor + column + i) : 1.0f;
  }
  start_dependents();
  wait_for_predecessor();
  if (!inside) return;
  const auto* x = reinterpret_cast<const unsigned short*>(p.x) + static_cast<std::size_t>(blockIdx.x) * p.cols;
  float values[8];
#pragma unroll
  for (int i = 0; i < 8; i++) values[i] = __bfloat162float(__ushort_as_bfloat16(__ldcg(x + from[i]))) * factor[i];
  *reinterpret_cast<uint4*>(p.out + static_cast<std::size_t>(blockIdx.x) * p.cols + column) =
      make_uint4(pack_bf16(values[0], values[1]), pack_bf16(values[2], values[3]), pack_bf16(values[4], values[5]),
                 pack_bf16(values[6], values[7]));
}

}  // namespace

void map_input_async(const InputMapArgs& args, cudaStream_t stream, bool pdl) {
  assert(args.cols % 8 == 0 && args.num_tokens >= 1 && args.x != args.out);
  launch(map_input_kernel, dim3(args.num_tokens, ceil_div(args.cols, 8 * kThreads)), dim3(kThreads), 0, stream, pdl,
         args);
}

}  // namespace edgellm::kernels
