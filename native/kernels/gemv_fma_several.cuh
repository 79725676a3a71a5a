// Two to eight tokens, any format but int4, each with the bits that gemv_fma.cuh gives it alone.
//
// A block has R whole rows, which it loads once, as for a single token; then the tokens take turns, some at a time, and
// every one of them is summed in the single token's order.
#pragma once

#include "gemv_fma.cuh"

namespace edgellm::kernels {

template <WeightFormat F, int C, int R, bool kNorm, int kMaxThreads>
__global__ void __launch_bounds__(kMaxThreads, 1) gemv_fma_several_kernel(const GemvParams p) {
  constexpr int kVec = kChunk<F>;
  constexpr int kXLoads = kVec / 8;
  // At a time: as many as keep their x in 16 registers and their sums in 32.
  constexpr int kByX = C * kXLoads >= 4 ? 1 : 4 / (C * kXLoads), kBySums = 32 / R;
  constexpr int kTokens = kByX < kBySums ? kByX : kBySums;
  constexpr int kMaxWarps = kMaxThreads / 32;
  __shared__ float partial[2][kTokens][kMaxWarps][R + 1];  // last: sum of squares; two take turns
  const int lane = threadIdx.x & 31, warp = warp_index(), num_warps = blockDim.x / 32, chunks = p.cols / kVec;

  WeightRows<F, C, R> rows;
  rows.load(p, chunks);
  uint4 gain[kNorm ? C * kXLoads : 1];
  if constexpr (kNorm) load_chunks<C, kXLoads, true>(p.gain, chunks, gain);
  const int own_row = block_row<R>(p, blockIdx.x, lane & (R - 1));
  RowConstants<F> constants;
  constants.load(p, own_row);
  start_dependents();
  wait_for_predecessor();

  int turn = 0;
  for (int base = 0; base < p.num_tokens; base += kTokens, turn ^= 1) {
    uint4 x[kTokens][C * kXLoads];
#pragma unroll
    for (int k = 0; k < kTokens; k++) {
      const int token = min(base + k, p.num_tokens - 1);
      load_chunks<C, kXLoads, false>(p.x + static_cast<std::size_t>(token) * p.cols, chunks, x[k]);
    }
    float sums[kTokens][R] = {};
    float squares[kTokens] = {};
#pragma unroll
    for (int c = 0; c < C; c++) {
      float xs[kTokens][kVec];
#pragma unroll
      for (int k = 0; k < kTokens; k++) {
        unpack_x<kXLoads, kNorm>(x[k] + c * kXLoads, gain + (kNorm ? c * kXLoads : 0), xs[k], squares[k]);
      }
#pragma unroll
      for (int r = 0; r < R; r++) {
        float ws[kVec];
        unpack_weights<F>(rows.w[r][c], ws);
        constexpr bool kGroups = WeightRows<F, C, R>::has_groups;
#pragma unroll
        for (int k = 0; k < kTokens; k++) {
          add_products<F>(ws, xs[k], rows.scale[kGroups ? r : 0][kGroups ? c : 0], sums[k][r]);
        }
      }
    }
    constexpr int kLanesPerRow = 32 / R;
#pragma unroll
    for (int k = 0; k < kTokens; k++) {
      warp_sums<R>(sums[k], lane);
      if constexpr (kNorm) squares[k] = warp_sum(squares[k]);
      if ((lane & (kLanesPerRow - 1)) == 0) partial[turn][k][warp][lane / kLanesPerRow] = sums[k][0];
      if (kNorm && lane == 0) partial[turn][k][warp][R] = squares[k];
    }
    __syncthreads();  // one a turn: who writes the other half is past this turn's reads of it
    for (int k = warp; k < kTokens; k += num_warps) {
      const int token = base + k;
      if (token >= p.num_tokens) break;
      const float old_residual = lane < R ? load_residual(p, token, own_row) : 0.0f;
      const float y = finish_sum<F, R, kMaxWarps, kNorm>(p, constants, partial[turn][k], lane, num_warps);
      finish_rows<R>(p, y, lane, token, blockIdx.x, own_row, old_residual);
    }
  }
}

template <WeightFormat F, bool kNorm, int kConfig>
void launch_several_config(const GemvArgs& args, const GemvTile& tile, cudaStream_t stream, bool pdl) {
  constexpr FmaConfig c = fma_config(kConfig, kChunk<F> == 16);
  launch(gemv_fma_several_kernel<F, c.chunks, c.rows, kNorm, c.max_threads>, dim3(gemv_blocks(args, c.rows)),
         dim3(tile.threads), 0, stream, pdl, gemv_params(args, c.rows));
}

template <WeightFormat F, bool kNorm, int kConfig = 0>
void launch_several_configs(const GemvArgs& args, const GemvTile& tile, cudaStream_t stream, bool pdl) {
  if (tile.config == kConfig) return launch_several_config<F, kNorm, kConfig>(args, tile, stream, pdl);
  if constexpr (kConfig + 1 < num_fma_configs(kChunk<F> == 16)) {
    launch_several_configs<F, kNorm, kConfig + 1>(args, tile, stream, pdl);
  }
}

// Of GemvArgs with two to eight tokens.
template <WeightFormat F>
void launch_fma_several(const GemvArgs& args, const GemvTile& tile, cudaStream_t stream, bool pdl) {
  if (args.gain) return launch_several_configs<F, true>(args, tile, stream, pdl);
  launch_several_configs<F, false>(args, tile, stream, pdl);
}

}  // namespace edgellm::kernels
