// 2 to 8 tokens on tensor cores, of which a block keeps x in shared memory for all rows that it multiplies. Sums as in
// gemv_tensor.cuh.
//
// What makes several tokens slower than one is their x: in gemv_tensor_ring.cuh every block of 32 rows waits for it,
// norms it, converts it and leaves, and has only its ring's weights under way meanwhile. Here there is one block a
// multiprocessor, which does that once, and whose ring runs on from one tile of rows to the next.
#pragma once

#include <algorithm>

#include "gemv_tensor_ring.cuh"

namespace edgellm::kernels {

// Units whose x is on its way to registers at a time.
template <WeightFormat F, XKind kKind>
constexpr int kResidentWindow = 2 * ring_window<F>(kMaxTensorTokens, kKind);

template <WeightFormat F, int kWarps, int kDepth, int kTiles, XKind kKind>
__global__ void __launch_bounds__(kWarps * 32, 1) gemv_tensor_resident_kernel(const GemvParams p) {
  constexpr int kRows = kTiles * 8, kPieces = TensorFormat<F>::pieces, kPlanes = kXPlanes<kKind>;
  constexpr int kWindow = kResidentWindow<F, kKind>, kLoads = x_loads<F, kKind>(kWindow);
  constexpr bool kNorm = kKind != XKind::plain;
  constexpr uint32_t kSlotBytes = kTiles * 32 * sizeof(uint4);
  // The warps' rings of kDepth slots, then (warps, kPlanes, tokens, token_words) of x.
  extern __shared__ uint4 shared[];
  // A tile's sums are added up while the next one's are computed. Last: sum of squares.
  __shared__ float partial[2][kWarps][kMaxTensorTokens][kRows + 1];
  const TensorShare<F, kWarps> share(p);
  const int lane = share.lane, warp = share.warp, g = share.g, t = share.t, num_tokens = p.num_tokens;

  // What is copied next: a tile of rows and one of the warp's units.
  const char* weights[kTiles];
  int next_block = share.first < share.last ? static_cast<int>(blockIdx.x) : p.num_blocks, next_unit = share.first;
  const auto point_at_rows = [&] {
#pragma unroll
    for (int m = 0; m < kTiles; m++) {
      const std::size_t row = block_row<kRows>(p, next_block, m * 8 + g);
      weights[m] = static_cast<const char*>(p.data) + row * share.row_bytes + t * 16;
    }
  };
  point_at_rows();
  const uint32_t ring = shared_address(shared) + warp * kDepth * kSlotBytes + lane * 16;
  const auto copy_next = [&](int slot) {
    if (next_block < p.num_blocks) {
#pragma unroll
      for (int m = 0; m < kTiles; m++) {
        copy_weights16(ring + slot * kSlotBytes + m * 512, weights[m] + next_unit * kUnitBytes,
                       next_unit < share.lane_last);
      }
      if (++next_unit == share.last) {
        next_unit = share.first, next_block += gridDim.x;
        point_at_rows();  // behind the last tile: those of its last row
      }
    }
    commit_copies();
  };
#pragma unroll
  for (int d = 0; d < kDepth; d++) copy_next(d);
  start_dependents();
  wait_for_predecessor();

  const int token_words = tensor_token_words<F>(share.last - share.first), plane_words = num_tokens * token_words;
  const int most_words = tensor_token_words<F>(ceil_div(ceil_div(share.row_bytes, kUnitBytes), kWarps));
  uint4* staged = shared + kWarps * kDepth * kTiles * 32 + warp * kPlanes * num_tokens * most_words;
  float squares[kMaxTensorTokens] = {};
  for (int begin = share.first; begin < share.last; begin += kWindow) {
    uint4 gain[kLoads], x[kMaxTensorTokens][kLoads];
    if constexpr (kNorm) load_gain_parts<F, kKind, kLoads>(p, share, begin, gain);
#pragma unroll
    for (int token = 0; token < kMaxTensorTokens; token++) {
      if (token >= num_tokens) break;
      load_x_parts<F, kKind, kLoads>(p, token, share, begin, x[token]);
    }
    uint4* window = staged + (begin - share.first) * kPieces * 4;
#pragma unroll
    for (int i = 0; i < kLoads; i++) {
      // A last window may be longer than what is left, and its last parts of no unit.
      const int unit = begin + (i * 32 + lane) / (TensorFormat<F>::chunks * kPartsOfEight<kKind>);
      float gains[8];
      unpack_gains<kKind>(gain[i], gains);
#pragma unroll
      for (int token = 0; token < kMaxTensorTokens; token++) {
        if (token >= num_tokens) break;
        uint4* own = window + token * token_words;
        if (unit < share.last) stage_x<F, kKind>(x[token][i], gains, i, lane, squares[token], own, own + plane_words);
      }
    }
  }
  if constexpr (kNorm) {
#pragma unroll
    for (int token = 0; token < kMaxTensorTokens; token++) {
      if (token >= num_tokens) break;
      const float total = warp_sum(squares[token]);
      if (lane == 0) partial[0][warp][token][kRows] = partial[1][warp][token][kRows] = total;
    }
  }
  __syncwarp();

  constexpr int kJobs = ceil_div(kMaxTensorTokens, kWarps);  // tokens that a warp finishes
  const uint4* fragments = staged + min(g, num_tokens - 1) * token_words + t;
  int slot = 0, buffer = 0;
  for (int block = blockIdx.x; block < p.num_blocks; block += gridDim.x, buffer ^= 1) {
    const int own_row = block_row<kRows>(p, block, lane & (kRows - 1));
    RowConstants<F> constants;
    if (warp < num_tokens) constants.load(p, own_row);
    float old_residual[kJobs];
#pragma unroll
    for (int i = 0; i < kJobs; i++) {
      const int token = warp + i * kWarps;
      old_residual[i] = token < num_tokens ? load_residual(p, token, own_row) : 0.0f;
    }
    float sums[kTiles][4] = {};  // of token g rows 2 t and 2 t + 1; the others are of no token
#pragma unroll 4
    for (int unit = share.first; unit < share.last; unit++) {
      wait_for_copies<kDepth - 1>();
      uint4 w[kTiles], pieces[kPieces], rest = make_uint4(0, 0, 0, 0);
#pragma unroll
      for (int m = 0; m < kTiles; m++) w[m] = load_shared16(ring + slot * kSlotBytes + m * 512);
      const uint4* at = fragments + (unit - share.first) * kPieces * 4;
#pragma unroll
      for (int i = 0; i < kPieces; i++) pieces[i] = g < num_tokens ? at[i * 4] : make_uint4(0, 0, 0, 0);
      if (kPlanes == 2 && g < num_tokens) rest = at[plane_words];
#pragma unroll
      for (int m = 0; m < kTiles; m++) add_unit<F, kPlanes>(w[m], pieces, rest, sums[m]);
      copy_next(slot);
      slot = slot + 1 == kDepth ? 0 : slot + 1;
    }
    if (g < num_tokens) {
#pragma unroll
      for (int m = 0; m < kTiles; m++) {
        partial[buffer][warp][g][m * 8 + 2 * t] = plane_sum<kPlanes>(sums[m], 0);
        partial[buffer][warp][g][m * 8 + 2 * t + 1] = plane_sum<kPlanes>(sums[m], 1);
      }
    }
    // Behind it, all have left the other buffer, too.
    __syncthreads();
#pragma unroll
    for (int i = 0; i < kJobs; i++) {
      const int token = warp + i * kWarps;
      if (token >= num_tokens) break;
      const float y = finish_tensor_sum<F, kWarps, kRows, kNorm>(p, constants, partial[buffer], token, lane);
      finish_rows<kRows>(p, y, lane, token, block, own_row, old_residual[i]);
    }
  }
}

// Shared memory of a block: what it has for every number of tokens, and what it is launched with.
constexpr std::size_t resident_static_bytes(const RingConfig& c) {
  return sizeof(float) * 2 * c.warps * kMaxTensorTokens * (c.tiles * 8 + 1);
}
template <WeightFormat F, XKind kKind>
constexpr std::size_t resident_bytes(const RingConfig& c, int cols, int tokens) {
  const int units = ceil_div(cols * TensorFormat<F>::bytes, kUnitBytes);
  const int token_words = kXPlanes<kKind> * tensor_token_words<F>(ceil_div(units, c.warps));
  return c.warps * (c.depth * c.tiles * 32 + tokens * token_words) * sizeof(uint4);
}

template <WeightFormat F, XKind kKind, int kConfig>
void launch_resident_config(const GemvArgs& args, cudaStream_t stream, bool pdl) {
  constexpr RingConfig c = kResidentConfigs[kConfig];
  const auto kernel = gemv_tensor_resident_kernel<F, c.warps, c.depth, c.tiles, kKind>;
  const DeviceTraits& traits = device_traits();
  thread_local int device = -1;
  if (device != traits.device) {
    EDGELLM_CUDA_TRY(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                          static_cast<int>(traits.max_shared_bytes - resident_static_bytes(c))));
    device = traits.device;
  }
  const GemvParams params = gemv_params(args, c.tiles * 8, kKind);
  launch(kernel, dim3(std::min(params.num_blocks, traits.num_sms)), dim3(c.warps * 32),
         resident_bytes<F, kKind>(c, args.weight.cols, args.num_tokens), stream, pdl, params);
}

template <WeightFormat F, XKind kKind>
void launch_resident_kind(const GemvArgs& args, const GemvTile& tile, cudaStream_t stream, bool pdl) {
  static_assert(kNumResidentConfigs == 2);
  if (tile.config == 0) return launch_resident_config<F, kKind, 0>(args, stream, pdl);
  launch_resident_config<F, kKind, 1>(args, stream, pdl);
}

template <WeightFormat F>
void launch_tensor_resident(const GemvArgs& args, const GemvTile& tile, cudaStream_t stream, bool pdl) {
  launch_for_x_kind<F>(args, [&](auto kind) { launch_resident_kind<F, kind.value>(args, tile, stream, pdl); });
}

}  // namespace edgellm::kernels
