// What the tensor-core kernels for 16-bit and fp8 weights share, so that a token gets the same bits from all of them,
// alone and beside up to seven others (gemv_tensor_once.cuh, gemv_tensor_ring.cuh).
//
// A block has kTiles tiles of 8 whole rows; its warps have contiguous shares of the input features, in units of 64
// bytes of a row. A lane's 16 bytes of weights are, as they come from memory, fragments of the B operand of
// mma.m16n8k16 (the order of the products' features is the same for x, which leaves the sums as they are); the tokens
// are A's first rows, on none of which another one's sums depend. x is put into shared memory by the warp that needs
// it, normed and converted once for all rows. What a token's bits depend on is the number of warps.
#pragma once

#include "gemv_common.cuh"
#include "launch.hpp"

namespace edgellm::kernels {

template <WeightFormat F>
struct TensorFormat {
  static constexpr bool is_bf16 = F == WeightFormat::bf16;
  static constexpr int bytes = F == WeightFormat::fp8 ? 1 : 2;
  static constexpr int pieces = 2 / bytes;                      // of eight x values that go with 16 bytes of weights
  static constexpr int chunks = 4 * pieces;                     // eights of x in a unit
  static constexpr float x_scale = is_bf16 ? 1.0f : 1.0f / 64;  // fp16: as in gemv_mma.cuh
};
constexpr int kUnitBytes = 64;

// 16-byte words that a token's x takes in a window of `units`: an odd number of 64 bytes, so that two tokens' reads
// fall into different banks.
template <WeightFormat F>
constexpr int tensor_token_words(int units) {
  return ((units * TensorFormat<F>::pieces) | 1) * 4;
}

// A lane's place in the work of a block.
template <WeightFormat F, int kWarps>
struct TensorShare {
  int lane, warp, g, t;  // g: row of a tile, and token; t: which 16 of a unit's 64 bytes
  int row_bytes;
  int first, last;  // the warp's units
  int lane_last;    // the same for the lane: a row may end in a unit
  int last_chunk;   // the end of the warp's eights of x

  __device__ __forceinline__ explicit TensorShare(const GemvParams& p) {
    lane = threadIdx.x & 31, warp = warp_index(), g = lane >> 2, t = lane & 3;
    row_bytes = p.cols * TensorFormat<F>::bytes;
    const int units = ceil_div(row_bytes, kUnitBytes), share = ceil_div(units, kWarps);
    first = warp * share, last = min(units, first + share);
    lane_last = min(last, (row_bytes - t * 16 + kUnitBytes - 1) / kUnitBytes);
    last_chunk = min(last * TensorFormat<F>::chunks, p.cols / 8);
  }
};

// The lane's eights of x or of the gain from unit `begin` on: numbers i * 32 + lane. Whatever the window, a lane's are
// those with its number modulo 32, in their order.
template <WeightFormat F, int kLoads, bool kConstant, class Share>
__device__ __forceinline__ void load_eights(const bf16* source, const Share& share, int begin, uint4* out) {
#pragma unroll
  for (int i = 0; i < kLoads; i++) {
    const int chunk = begin * TensorFormat<F>::chunks + i * 32 + share.lane;
    out[i] = make_uint4(0, 0, 0, 0);
    if (chunk < share.last_chunk)
      out[i] = kConstant ? load_constant(source + chunk * 8) : load_activation(source + chunk * 8);
  }
}

// Eight x values as the product takes them; adds to the sum of squares.
template <WeightFormat F, bool kNorm>
__device__ __forceinline__ uint4 convert_x(const uint4& x, const float* gains, float& squares) {
  if constexpr (!kNorm && TensorFormat<F>::is_bf16) return x;
  float xs[8];
  unpack_bf16(x, xs);
  if constexpr (kNorm) {
#pragma unroll
    for (int j = 0; j < 8; j++) {
      squares = fmaf(xs[j], xs[j], squares);
      xs[j] *= gains[j];
    }
  }
  uint32_t words[4];
#pragma unroll
  for (int j = 0; j < 4; j++) {
    if constexpr (TensorFormat<F>::is_bf16) {
      words[j] = pack_bf16(xs[2 * j], xs[2 * j + 1]);
    } else {
      words[j] = pack_fp16(xs[2 * j] * TensorFormat<F>::x_scale, xs[2 * j + 1] * TensorFormat<F>::x_scale);
    }
  }
  return make_uint4(words[0], words[1], words[2], words[3]);
}

// Where the lane's eight number i of a window goes: in the order in which lanes read a unit's fragments.
template <WeightFormat F>
__device__ __forceinline__ int staged_at(int i, int lane) {
  constexpr int kChunks = TensorFormat<F>::chunks, kPieces = TensorFormat<F>::pieces;
  const int chunk = i * 32 + lane;
  return (chunk / kChunks * kPieces + chunk % kPieces) * 4 + chunk / kPieces % 4;
}

// Adds the products of a lane's 16 bytes of weights and its piece or pieces of x, of token g.
template <WeightFormat F>
__device__ __forceinline__ void add_unit(const uint4& weights, const uint4* x, float* sums) {
  const uint32_t words[4] = {weights.x, weights.y, weights.z, weights.w};
  if constexpr (TensorFormat<F>::bytes == 2) {
    const uint32_t low[4] = {x[0].x, 0u, x[0].y, 0u}, high[4] = {x[0].z, 0u, x[0].w, 0u};
    if constexpr (TensorFormat<F>::is_bf16) {
      mma_bf16(sums, low, words[0], words[1]);
      mma_bf16(sums, high, words[2], words[3]);
    } else {
      mma_fp16(sums, low, words[0], words[1]);
      mma_fp16(sums, high, words[2], words[3]);
    }
  } else {
#pragma unroll
    for (int j = 0; j < 4; j++) {
      const uint4 eight = x[j / 2 % TensorFormat<F>::pieces];
      const uint32_t a[4] = {j & 1 ? eight.z : eight.x, 0u, j & 1 ? eight.w : eight.y, 0u};
      mma_fp16(sums, a, fp8x2_to_fp16x2(words[j]), fp8x2_to_fp16x2(words[j] >> 16));
    }
  }
}

// The warps' sums of one token, partial[warp][row] with the sum of squares as the last, to the finished sum of row
// lane % kRows: four sums, each of every fourth warp, by as many lanes as there are, then those.
template <WeightFormat F, int kWarps, int kRows, bool kNorm, class Partial>
__device__ __forceinline__ float finish_tensor_sum(const GemvParams& p, const RowConstants<F>& constants,
                                                   const Partial& partial, int token, int lane) {
  static_assert(kWarps % 4 == 0 && kRows <= 32);
  constexpr int kLanes = 32 / kRows, kEach = 4 / kLanes;  // lanes of a row; sums that each has
  float y[kEach] = {}, total[kEach] = {};
#pragma unroll
  for (int part = 0; part < kEach; part++) {
#pragma unroll
    for (int w = 0; w < kWarps; w += 4) {
      const int from = w + part * kLanes + lane / kRows;
      y[part] += partial[from][token][lane & (kRows - 1)];
      if constexpr (kNorm) total[part] += partial[from][token][kRows];
    }
#pragma unroll
    for (int s = kRows; s < 32; s *= 2) {
      y[part] += __shfl_xor_sync(kAllLanes, y[part], s);
      if constexpr (kNorm) total[part] += __shfl_xor_sync(kAllLanes, total[part], s);
    }
  }
  if constexpr (kEach == 2) y[0] += y[1], total[0] += total[1];
  if constexpr (kEach == 4)
    y[0] = (y[0] + y[1]) + (y[2] + y[3]), total[0] = (total[0] + total[1]) + (total[2] + total[3]);
  if constexpr (kNorm) y[0] *= rsqrtf(total[0] * p.inverse_cols + p.norm_eps);
  return constants.apply(y[0] * (1.0f / TensorFormat<F>::x_scale));
}

}  // namespace edgellm::kernels
