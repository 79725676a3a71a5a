// 1 to 8 tokens on tensor cores, rows of any length. Sums as in gemv_tensor.cuh.
//
// Weights go to shared memory by cp.async, each lane's to places that only it reads: kDepth units of a warp are under
// way, from before the predecessor has finished until the last. A warp waits for one unit at a time, where loads into
// registers that are used again would be waited for together.
#pragma once

#include "copy_async.cuh"
#include "gemv_tensor.cuh"

namespace edgellm::kernels {

// Units whose x is staged at a time: 32 lanes bring a part of each token, a single token's two.
template <WeightFormat F>
constexpr int ring_window(int max_tokens, XKind kind) {
  return (max_tokens == 1 ? 64 : 32) / (kind == XKind::wide ? 2 : 1) / TensorFormat<F>::chunks;
}

template <WeightFormat F, int kWarps, int kDepth, int kTiles, XKind kKind, int kMaxTokens>
__global__ void __launch_bounds__(kWarps * 32, (kMaxTokens == 1 ? 32 : 16) / kWarps)
    gemv_tensor_ring_kernel(const GemvParams p) {
  constexpr int kRows = kTiles * 8, kPieces = TensorFormat<F>::pieces;
  constexpr int kWindow = ring_window<F>(kMaxTokens, kKind), kTokenWords = tensor_token_words<F>(kWindow);
  constexpr int kLoads = x_loads<F, kKind>(kWindow), kPlanes = kXPlanes<kKind>;
  constexpr bool kNorm = kKind != XKind::plain;
  constexpr uint32_t kSlotBytes = kTiles * 32 * sizeof(uint4);
  static_assert(kWindow % kDepth == 0);
  // The warps' rings of kDepth slots, then (warps, kPlanes, tokens, kTokenWords) of x.
  extern __shared__ uint4 shared[];
  __shared__ float partial[kWarps][kMaxTokens][kRows + 1];  // last: sum of squares
  const TensorShare<F, kWarps> share(p);
  const int lane = share.lane, warp = share.warp, g = share.g, t = share.t;
  const int num_tokens = kMaxTokens == 1 ? 1 : p.num_tokens;

  const char* weights[kTiles];
#pragma unroll
  for (int m = 0; m < kTiles; m++) {
    const std::size_t row = block_row<kRows>(p, blockIdx.x, m * 8 + g);
    weights[m] = static_cast<const char*>(p.data) + row * share.row_bytes + t * 16;
  }
  const uint32_t ring = shared_address(shared) + warp * kDepth * kSlotBytes + lane * 16;
  const auto copy = [&](int slot, int unit) {
#pragma unroll
    for (int m = 0; m < kTiles; m++) {
      copy_weights16(ring + slot * kSlotBytes + m * 512, weights[m] + unit * kUnitBytes, unit < share.lane_last);
    }
    commit_copies();
  };
#pragma unroll
  for (int d = 0; d < kDepth; d++) copy(d, share.first + d);
  uint4 gain[kLoads];
  if constexpr (kNorm) load_gain_parts<F, kKind, kLoads>(p, share, share.first, gain);
  const int own_row = block_row<kRows>(p, blockIdx.x, lane & (kRows - 1));
  RowConstants<F> constants;
  if (warp < num_tokens) constants.load(p, own_row);
  start_dependents();
  wait_for_predecessor();

  uint4 x[kMaxTokens][kLoads];
  const auto load_x = [&](int begin) {
#pragma unroll
    for (int token = 0; token < kMaxTokens; token++) {
      if (token >= num_tokens) break;
      load_x_parts<F, kKind, kLoads>(p, token, share, begin, x[token]);
    }
  };
  load_x(share.first);
  constexpr int kJobs = ceil_div(kMaxTokens, kWarps);  // tokens that a warp finishes
  float old_residual[kJobs];
#pragma unroll
  for (int i = 0; i < kJobs; i++) {
    const int token = warp + i * kWarps;
    old_residual[i] = token < num_tokens ? load_residual(p, token, own_row) : 0.0f;
  }
  const int plane_words = num_tokens * kTokenWords;
  uint4* staged = shared + kWarps * kDepth * kTiles * 32 + warp * kPlanes * plane_words;
  const uint4* fragments = staged + min(g, num_tokens - 1) * kTokenWords + t;
  float squares[kMaxTokens] = {};
  float sums[kTiles][4] = {};  // of token g rows 2 t and 2 t + 1; the others are of no token
  for (int begin = share.first; begin < share.last; begin += kWindow) {
#pragma unroll
    for (int i = 0; i < kLoads; i++) {
      float gains[8];
      unpack_gains<kKind>(gain[i], gains);
#pragma unroll
      for (int token = 0; token < kMaxTokens; token++) {
        if (token >= num_tokens) break;
        uint4* own = staged + token * kTokenWords;
        stage_x<F, kKind>(x[token][i], gains, i, lane, squares[token], own, own + plane_words);
      }
    }
    __syncwarp();
    if (begin + kWindow < share.last) {
      if constexpr (kNorm) load_gain_parts<F, kKind, kLoads>(p, share, begin + kWindow, gain);
      load_x(begin + kWindow);
    }
#pragma unroll
    for (int d = 0; d < kWindow; d++) {
      const int unit = begin + d, slot = d % kDepth;
      if (unit >= share.last) break;
      wait_for_copies<kDepth - 1>();
      uint4 w[kTiles], pieces[kPieces], rest = make_uint4(0, 0, 0, 0);
#pragma unroll
      for (int m = 0; m < kTiles; m++) w[m] = load_shared16(ring + slot * kSlotBytes + m * 512);
#pragma unroll
      for (int i = 0; i < kPieces; i++) {
        pieces[i] = g < num_tokens ? fragments[(d * kPieces + i) * 4] : make_uint4(0, 0, 0, 0);
      }
      if (kPlanes == 2 && g < num_tokens) rest = fragments[plane_words + d * 4];
#pragma unroll
      for (int m = 0; m < kTiles; m++) add_unit<F, kPlanes>(w[m], pieces, rest, sums[m]);
      copy(slot, unit + kDepth);
    }
    __syncwarp();
  }

  if (g < num_tokens) {
#pragma unroll
    for (int m = 0; m < kTiles; m++) {
      partial[warp][g][m * 8 + 2 * t] = plane_sum<kPlanes>(sums[m], 0);
      partial[warp][g][m * 8 + 2 * t + 1] = plane_sum<kPlanes>(sums[m], 1);
    }
  }
  if constexpr (kNorm) {
#pragma unroll
    for (int token = 0; token < kMaxTokens; token++) {
      if (token >= num_tokens) break;
      const float total = warp_sum(squares[token]);
      if (lane == 0) partial[warp][token][kRows] = total;
    }
  }
  __syncthreads();
#pragma unroll
  for (int i = 0; i < kJobs; i++) {
    const int token = warp + i * kWarps;
    if (token >= num_tokens) return;
    const float y = finish_tensor_sum<F, kWarps, kRows, kNorm>(p, constants, partial, token, lane);
    finish_rows<kRows>(p, y, lane, token, blockIdx.x, own_row, old_residual[i]);
  }
}

// Dynamic shared memory of a block.
template <WeightFormat F, XKind kKind>
constexpr std::size_t ring_bytes(const RingConfig& c, int max_tokens, int tokens) {
  const int token_words = kXPlanes<kKind> * tensor_token_words<F>(ring_window<F>(max_tokens, kKind));
  return c.warps * (c.depth * c.tiles * 32 + tokens * token_words) * sizeof(uint4);
}

template <WeightFormat F, XKind kKind, int kMaxTokens, int kConfig>
void launch_ring_config(const GemvArgs& args, cudaStream_t stream, bool pdl) {
  constexpr RingConfig c = kRingConfigs[kConfig];
  constexpr std::size_t kMost = ring_bytes<F, kKind>(c, kMaxTokens, kMaxTokens);
  static_assert(kMost + c.warps * kMaxTokens * (c.tiles * 8 + 1) * sizeof(float) <=
                kSharedBytesOf16Warps * c.warps / 16);
  const auto kernel = gemv_tensor_ring_kernel<F, c.warps, c.depth, c.tiles, kKind, kMaxTokens>;
  if (kMost > kPlainSharedBytes) {  // what most tokens need: of another thread's launch with more of them, too
    EDGELLM_CUDA_TRY(
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(kMost)));
  }
  launch(kernel, dim3(gemv_blocks(args, c.tiles * 8)), dim3(c.warps * 32),
         ring_bytes<F, kKind>(c, kMaxTokens, args.num_tokens), stream, pdl, gemv_params(args, c.tiles * 8, kKind));
}

template <WeightFormat F, XKind kKind, int kMaxTokens, int kConfig = 0>
void launch_ring_configs(const GemvArgs& args, const GemvTile& tile, cudaStream_t stream, bool pdl) {
  if constexpr (kRingConfigs[kConfig].several == (kMaxTokens > 1)) {
    if (tile.config == kConfig) return launch_ring_config<F, kKind, kMaxTokens, kConfig>(args, stream, pdl);
  }
  if constexpr (kConfig + 1 < kNumRingConfigs) {
    launch_ring_configs<F, kKind, kMaxTokens, kConfig + 1>(args, tile, stream, pdl);
  }
}

template <WeightFormat F, int kMaxTokens>
void launch_tensor_ring(const GemvArgs& args, const GemvTile& tile, cudaStream_t stream, bool pdl) {
  launch_for_x_kind<F>(args,
                       [&](auto kind) { launch_ring_configs<F, kind.value, kMaxTokens>(args, tile, stream, pdl); });
}

}  // namespace edgellm::kernels
