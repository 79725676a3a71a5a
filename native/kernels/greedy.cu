// Greedy decoding: the largest of the head's per-block maxima, and everything the next step needs, in one block.
#include "device.cuh"
#include "edgellm/kernels/sampling.hpp"
#include "launch.hpp"
#include "sampling_finish.cuh"

namespace edgellm::kernels {

namespace {

constexpr int kThreads = 1024;

__global__ void __launch_bounds__(kThreads, 1)
    greedy_kernel(const unsigned long long* block_max, int num_blocks, const NextStep next) {
  __shared__ unsigned long long warp_keys[32];
  start_dependents();
  wait_for_predecessor();
  const int b = blockIdx.x, lane = threadIdx.x & 31;
  if (!is_active(next.state, b)) return;
  const unsigned long long* keys = block_max + static_cast<std::size_t>(b) * num_blocks;
  unsigned long long key = 0;
  for (int i = threadIdx.x; i < num_blocks; i += kThreads) key = larger(key, __ldcg(keys + i));
#pragma unroll
  for (int s = 16; s >= 1; s >>= 1) key = larger(key, __shfl_xor_sync(kAllLanes, key, s));
  if (lane == 0) warp_keys[threadIdx.x / 32] = key;
  __syncthreads();
  key = warp_keys[lane];
#pragma unroll
  for (int s = 16; s >= 1; s >>= 1) key = larger(key, __shfl_xor_sync(kAllLanes, key, s));
  const bool finite = (key >> 32) < 0xff800000ull;  // infinity, as max_key orders it; NaN lies above
  finish_token(next, b, finite ? static_cast<int>(key_index(key)) : -1);
}

}  // namespace

void greedy_async(const GreedyArgs& args, cudaStream_t stream, bool pdl) {
  launch(greedy_kernel, dim3(args.batch), dim3(kThreads), 0, stream, pdl, args.block_max, args.num_blocks,
         next_step(args.state, args.table, args.embed_scale, args.residual, args.residual_bf16));
}

}  // namespace edgellm::kernels
