// What the tensor-core kernels for 16-bit and fp8 weights share, so that a token gets the same bits from all of them,
// alone and beside up to seven others (gemv_tensor_once.cuh, gemv_tensor_ring.cuh, gemv_tensor_resident.cuh).
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

// Of x a lane loads 16 bytes at a time, eight numbers in bf16 or four in fp32, which with their gains are a part.
template <XKind kKind>
constexpr int kPartsOfEight = kKind == XKind::wide ? 2 : 1;
template <WeightFormat F, XKind kKind>
constexpr int x_loads(int units) {  // of a lane, for as many units
  return ceil_div(units * TensorFormat<F>::chunks * kPartsOfEight<kKind>, 32);
}
// Rows of A that a token fills: with what rounding to bf16 takes from x in a second one, x has 16 bits.
template <XKind kKind>
constexpr int kXPlanes = kKind == XKind::wide ? 2 : 1;

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

// The lane's parts of a token's x, and those of the gain. Of fours as of eights.
template <WeightFormat F, XKind kKind, int kLoads, class Share>
__device__ __forceinline__ void load_x_parts(const GemvParams& p, int token, const Share& share, int begin,
                                             uint4* out) {
  const std::size_t row = static_cast<std::size_t>(token) * p.cols;
  if constexpr (kKind == XKind::wide) {
#pragma unroll
    for (int i = 0; i < kLoads; i++) {
      const int four = begin * TensorFormat<F>::chunks * 2 + i * 32 + share.lane;
      out[i] = make_uint4(0, 0, 0, 0);
      if (four < share.last_chunk * 2) out[i] = load_activation(wide_x(p) + row + four * 4);
    }
  } else {
    load_eights<F, kLoads, false>(p.x + row, share, begin, out);
  }
}
template <WeightFormat F, XKind kKind, int kLoads, class Share>
__device__ __forceinline__ void load_gain_parts(const GemvParams& p, const Share& share, int begin, uint4* out) {
  if constexpr (kKind == XKind::wide) {
#pragma unroll
    for (int i = 0; i < kLoads; i++) {
      const int four = begin * TensorFormat<F>::chunks * 2 + i * 32 + share.lane;
      uint2 gains = make_uint2(0, 0);
      if (four < share.last_chunk * 2) gains = __ldg(reinterpret_cast<const uint2*>(p.gain + four * 4));
      out[i] = make_uint4(gains.x, gains.y, 0, 0);
    }
  } else {
    load_eights<F, kLoads, true>(p.gain, share, begin, out);
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

// Where a window's eight number `chunk` goes: in the order in which lanes read a unit's fragments.
template <WeightFormat F>
__device__ __forceinline__ int staged_at(int chunk) {
  constexpr int kChunks = TensorFormat<F>::chunks, kPieces = TensorFormat<F>::pieces;
  return (chunk / kChunks * kPieces + chunk % kPieces) * 4 + chunk / kPieces % 4;
}

template <XKind kKind>
__device__ __forceinline__ void unpack_gains(const uint4& gain, float* gains) {  // gains[8], or [4]
  if constexpr (kKind == XKind::wide) {
    gains[0] = low_float(gain.x), gains[1] = high_float(gain.x);
    gains[2] = low_float(gain.y), gains[3] = high_float(gain.y);
  } else if constexpr (kKind == XKind::normed) {
    unpack_bf16(gain, gains);
  }
}

// Puts the lane's part number i of a window into a token's place; `rest` is that of its second plane.
template <WeightFormat F, XKind kKind>
__device__ __forceinline__ void stage_x(const uint4& x, const float* gains, int i, int lane, float& squares,
                                        uint4* staged, uint4* rest) {
  if constexpr (kKind == XKind::wide) {
    float xs[4] = {__uint_as_float(x.x), __uint_as_float(x.y), __uint_as_float(x.z), __uint_as_float(x.w)};
#pragma unroll
    for (int j = 0; j < 4; j++) {
      squares = fmaf(xs[j], xs[j], squares);
      xs[j] =
          __fmul_rn(xs[j], gains[j]);  // and not as a part of the difference below, in one kernel and not in another
    }
    const int four = i * 32 + lane, at = 2 * staged_at<F>(four / 2) + four % 2;
    const uint2 rounded = make_uint2(pack_bf16(xs[0], xs[1]), pack_bf16(xs[2], xs[3]));
    reinterpret_cast<uint2*>(staged)[at] = rounded;
    reinterpret_cast<uint2*>(rest)[at] =
        make_uint2(pack_bf16(xs[0] - low_float(rounded.x), xs[1] - high_float(rounded.x)),
                   pack_bf16(xs[2] - low_float(rounded.y), xs[3] - high_float(rounded.y)));
  } else {
    staged[staged_at<F>(i * 32 + lane)] = convert_x<F, kKind == XKind::normed>(x, gains, squares);
  }
}

// Adds the products of a lane's 16 bytes of weights and its piece or pieces of x, of token g; with two planes, which
// are of bf16, `rest` is what rounding has taken from x.
template <WeightFormat F, int kPlanes>
__device__ __forceinline__ void add_unit(const uint4& weights, const uint4* x, const uint4& rest, float* sums) {
  const uint32_t words[4] = {weights.x, weights.y, weights.z, weights.w};
  if constexpr (kPlanes == 2) {
    const uint32_t low[4] = {x[0].x, rest.x, x[0].y, rest.y}, high[4] = {x[0].z, rest.z, x[0].w, rest.w};
    mma_bf16(sums, low, words[0], words[1]);
    mma_bf16(sums, high, words[2], words[3]);
  } else if constexpr (TensorFormat<F>::bytes == 2) {
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

// The sum of row 2 t + i of a tile and token g: of its plane or planes.
template <int kPlanes>
__device__ __forceinline__ float plane_sum(const float* sums, int i) {
  return kPlanes == 2 ? sums[i] + sums[i + 2] : sums[i];
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
