// One token on tensor cores: each weight goes from memory to a register to a product, once. Sums as in gemv_tensor.cuh.
//
// A warp's share is in flight as a whole, in registers and most of it requested before the predecessor has finished.
// The memory system sees many short-lived blocks, whose freed places the next kernel's blocks fill.
#pragma once

#include "gemv_tensor.cuh"

namespace edgellm::kernels {

// Of a block, with what the system takes.
template <WeightFormat F, XKind kKind>
constexpr std::size_t once_shared_bytes(int warps, int depth, int tiles) {
  const int words = kXPlanes<kKind> * x_loads<F, kKind>(depth) * 32 / kPartsOfEight<kKind>;
  return warps * (words * sizeof(uint4) + (tiles * 8 + 1) * sizeof(float)) + 1024;
}

template <WeightFormat F, int kWarps, int kDepth, int kTiles, int kMinBlocks, XKind kKind>
__global__ void __launch_bounds__(kWarps * 32, kMinBlocks) gemv_tensor_once_kernel(const GemvParams p) {
  constexpr int kRows = kTiles * 8, kPieces = TensorFormat<F>::pieces;
  constexpr int kLoads = x_loads<F, kKind>(kDepth);
  constexpr int kPlaneWords = kLoads * 32 / kPartsOfEight<kKind>, kPlanes = kXPlanes<kKind>;
  constexpr bool kNorm = kKind != XKind::plain;
  __shared__ uint4 all_staged[kWarps][kPlanes * kPlaneWords];
  __shared__ float partial[kWarps][1][kRows + 1];  // last: sum of squares
  const TensorShare<F, kWarps> share(p);
  const int lane = share.lane, warp = share.warp;

  uint4 weights[kDepth][kTiles];
#pragma unroll
  for (int m = 0; m < kTiles; m++) {
    const std::size_t row = block_row<kRows>(p, blockIdx.x, m * 8 + share.g);
    const char* at = static_cast<const char*>(p.data) + row * share.row_bytes + share.first * kUnitBytes + share.t * 16;
#pragma unroll
    for (int d = 0; d < kDepth; d++) {
      weights[d][m] = share.first + d < share.lane_last ? load_once(at + d * kUnitBytes) : make_uint4(0, 0, 0, 0);
    }
  }
  uint4 gain[kLoads];
  if constexpr (kNorm) load_gain_parts<F, kKind, kLoads>(p, share, share.first, gain);
  const int own_row = block_row<kRows>(p, blockIdx.x, lane & (kRows - 1));
  RowConstants<F> constants;
  if (warp == 0) constants.load(p, own_row);
  start_dependents();
  wait_for_predecessor();

  uint4 x[kLoads];
  load_x_parts<F, kKind, kLoads>(p, 0, share, share.first, x);
  const float old_residual = warp == 0 ? load_residual(p, 0, own_row) : 0.0f;
  uint4* staged = all_staged[warp];
  float squares = 0.0f;
#pragma unroll
  for (int i = 0; i < kLoads; i++) {
    float gains[8];
    unpack_gains<kKind>(gain[i], gains);
    stage_x<F, kKind>(x[i], gains, i, lane, squares, staged, staged + kPlaneWords);
  }
  __syncwarp();
  float sums[kTiles][4] = {};  // of token 0 rows 2 t and 2 t + 1 in the lanes of g = 0; the others are of no token
#pragma unroll
  for (int d = 0; d < kDepth; d++) {
    if (share.first + d >= share.last) break;
    uint4 pieces[kPieces], rest = make_uint4(0, 0, 0, 0);
#pragma unroll
    for (int i = 0; i < kPieces; i++) {
      pieces[i] = share.g == 0 ? staged[(d * kPieces + i) * 4 + share.t] : make_uint4(0, 0, 0, 0);
    }
    if (kPlanes == 2 && share.g == 0) rest = staged[kPlaneWords + d * 4 + share.t];
#pragma unroll
    for (int m = 0; m < kTiles; m++) add_unit<F, kPlanes>(weights[d][m], pieces, rest, sums[m]);
  }
  if (share.g == 0) {
#pragma unroll
    for (int m = 0; m < kTiles; m++) {
      partial[warp][0][m * 8 + 2 * share.t] = plane_sum<kPlanes>(sums[m], 0);
      partial[warp][0][m * 8 + 2 * share.t + 1] = plane_sum<kPlanes>(sums[m], 1);
    }
  }
  if constexpr (kNorm) {
    squares = warp_sum(squares);
    if (lane == 0) partial[warp][0][kRows] = squares;
  }
  __syncthreads();
  if (warp != 0) return;
  const float y = finish_tensor_sum<F, kWarps, kRows, kNorm>(p, constants, partial, 0, lane);
  finish_rows<kRows>(p, y, lane, 0, blockIdx.x, own_row, old_residual);
}

template <WeightFormat F, XKind kKind, int kConfig = 0>
void launch_once_configs(const GemvArgs& args, const GemvTile& tile, cudaStream_t stream, bool pdl) {
  constexpr OnceConfig c = kOnceConfigs[kConfig];
  if (tile.config == kConfig) {
    const auto kernel = gemv_tensor_once_kernel<F, c.warps, c.depth, c.tiles, c.min_blocks, kKind>;
    thread_local int device = -1;
    prefer_l1(kernel, c.min_blocks * once_shared_bytes<F, kKind>(c.warps, c.depth, c.tiles), device);
    return launch(kernel, dim3(gemv_blocks(args, c.tiles * 8)), dim3(c.warps * 32), 0, stream, pdl,
                  gemv_params(args, c.tiles * 8, kKind));
  }
  if constexpr (kConfig + 1 < kNumOnceConfigs) launch_once_configs<F, kKind, kConfig + 1>(args, tile, stream, pdl);
}

template <WeightFormat F>
void launch_tensor_once(const GemvArgs& args, const GemvTile& tile, cudaStream_t stream, bool pdl) {
  launch_for_x_kind<F>(args, [&](auto kind) { launch_once_configs<F, kind.value>(args, tile, stream, pdl); });
}

}  // namespace edgellm::kernels
