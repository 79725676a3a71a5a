// 1 to 16 tokens on tensor cores: eight tokens cost as many instructions as one. 16-bit and fp8 weights have the
// kernels of gemv_tensor.cuh for up to eight.
//
// A block has one or two tiles of 16 rows; its warps share the input features in blocks of 64, so that a quad of lanes
// reads whole 128-byte lines. The order of a tile's input features is permuted inside a block of 64 (the same way for
// weights and x, which leaves the products as they are) so that each lane's share is contiguous in memory: no shared
// memory, no shuffles, 16-byte loads straight into the fragments of mma.m16n8k16.
#pragma once

#include "gemv_common.cuh"
#include "launch.hpp"

namespace edgellm::kernels {

// fp16 has the range for 8-bit weights but not for activations: x is scaled down, the sums up again. 2^-6 keeps
// magnitudes up to 4e6 finite, and those from 4e-3 at full precision.
constexpr float kXScale = 1.0f / 64.0f;

template <WeightFormat F>
struct MmaFormat {
  static constexpr bool is_bf16 = F == WeightFormat::bf16 || F == WeightFormat::int4;  // else fp16 products
  static constexpr bool is_16bit = F == WeightFormat::bf16 || F == WeightFormat::fp16;
  static constexpr bool is_fp8 = F == WeightFormat::fp8 || F == WeightFormat::fp8_blocks;
  // A group's products are summed before they are scaled; else weights are, if at all.
  static constexpr bool sums_groups = F == WeightFormat::int4 || F == WeightFormat::fp8_blocks;
  // A word for both rows of a lane (int4: a group), or one each.
  static constexpr bool has_wide_scales = F == WeightFormat::int8_offset || F == WeightFormat::fp8_blocks;
  // 16-byte loads of a lane for a tile of 16 rows and 64 input features.
  static constexpr int loads = is_16bit ? 4 : F == WeightFormat::int4 ? 1 : 2;
};

// Two fp16 times the low half of `scale`, plus the high one.
__device__ __forceinline__ uint32_t scale_and_offset(uint32_t two, uint32_t scale) {
  const half2 both = bits_as<half2>(scale);
  return bits_as<uint32_t>(__hfma2(bits_as<half2>(two), __low2half2(both), __high2half2(both)));
}

// A tile's weights for 64 input features, as loaded, of one lane.
template <WeightFormat F, int kGroupsPerBlock>
struct MmaWeights {
  uint4 w[MmaFormat<F>::loads];
  // fp16 of rows g and g + 8, or a word of each
  uint32_t scale[F == WeightFormat::int4 ? kGroupsPerBlock : MmaFormat<F>::has_wide_scales ? 2 : 1];

  __device__ __forceinline__ void load(const GemvParams& p, int tile, int block, int lane) {
    const int g = lane >> 2, t = lane & 3;
    if constexpr (F == WeightFormat::int4) {
      const int num_blocks = ceil_div(p.cols, 64);
      w[0] = load_once(static_cast<const uint4*>(p.data) + (static_cast<std::size_t>(tile) * num_blocks + block) * 32 +
                       lane);
      const int num_groups = kGroupsPerBlock == 1 ? p.cols >> p.group_shift : num_blocks * kGroupsPerBlock;
      const uint32_t* scales =
          static_cast<const uint32_t*>(p.scales) + static_cast<std::size_t>(tile) * num_groups * 8 + g;
#pragma unroll
      for (int i = 0; i < kGroupsPerBlock; i++) {
        scale[i] =
            __ldg(scales + (kGroupsPerBlock == 1 ? block >> (p.group_shift - 6) : block * kGroupsPerBlock + i) * 8);
      }
      return;
    }
    const int column = block * 64 + t * 16;
    const bool inside = column < p.cols;  // cols is a multiple of 16
#pragma unroll
    for (int i = 0; i < 2; i++) {  // rows g and g + 8
      const std::size_t row = block_row<kMmaRows>(p, tile, g + 8 * i);
      constexpr int kLoadsPerRow = MmaFormat<F>::is_16bit ? 2 : 1;
      const char* at = static_cast<const char*>(p.data) + (row * p.cols + column) * kLoadsPerRow;
#pragma unroll
      for (int j = 0; j < kLoadsPerRow; j++) {
        w[i * kLoadsPerRow + j] = inside ? load_once(at + 16 * j) : make_uint4(0, 0, 0, 0);
      }
    }
    if constexpr (F == WeightFormat::int8) {
      const __half* scales = static_cast<const __half*>(p.scales);
      const int num_groups = p.cols >> p.group_shift, group = column >> p.group_shift;
      const std::size_t low = block_row<kMmaRows>(p, tile, g), high = block_row<kMmaRows>(p, tile, g + 8);
      scale[0] = 0;
      if (inside) {
        scale[0] = bits_as<uint32_t>(
            __halves2half2(__ldg(scales + low * num_groups + group), __ldg(scales + high * num_groups + group)));
      }
    }
    if constexpr (MmaFormat<F>::has_wide_scales) {
      const uint32_t* scales = static_cast<const uint32_t*>(p.scales);
      const int num_groups = p.cols >> p.group_shift, group = column >> p.group_shift;
#pragma unroll
      for (int i = 0; i < 2; i++) {
        const std::size_t row = block_row<kMmaRows>(p, tile, g + 8 * i);
        scale[i] = inside ? __ldg(scales + row * num_groups + group) : 0;
      }
    }
  }

  // The fragment of step s (16 of the 64 input features).
  __device__ __forceinline__ void fragment(int s, uint32_t* a) const {
    if constexpr (F == WeightFormat::int4) {
      const uint32_t words[4] = {w[0].x, w[0].y, w[0].z, w[0].w};
#pragma unroll
      for (int j = 0; j < 4; j++) a[j] = int4x2_to_bf16x2(words[s], j);
    } else if constexpr (MmaFormat<F>::is_16bit) {
      const uint4 low = w[s / 2], high = w[2 + s / 2];
      a[0] = s & 1 ? low.z : low.x, a[1] = s & 1 ? high.z : high.x;
      a[2] = s & 1 ? low.w : low.y, a[3] = s & 1 ? high.w : high.y;
    } else {
      const uint32_t lows[4] = {w[0].x, w[0].y, w[0].z, w[0].w}, highs[4] = {w[1].x, w[1].y, w[1].z, w[1].w};
      if constexpr (MmaFormat<F>::is_fp8) {
        a[0] = fp8x2_to_fp16x2(lows[s]), a[1] = fp8x2_to_fp16x2(highs[s]);
        a[2] = fp8x2_to_fp16x2(lows[s] >> 16), a[3] = fp8x2_to_fp16x2(highs[s] >> 16);
      } else if constexpr (F == WeightFormat::int8_offset) {
        const uint32_t low = lows[s] ^ 0x80808080u, high = highs[s] ^ 0x80808080u;
        a[0] = scale_and_offset(int8x2_to_fp16x2<0>(low), scale[0]);
        a[1] = scale_and_offset(int8x2_to_fp16x2<0>(high), scale[1]);
        a[2] = scale_and_offset(int8x2_to_fp16x2<1>(low), scale[0]);
        a[3] = scale_and_offset(int8x2_to_fp16x2<1>(high), scale[1]);
      } else {
        const uint32_t low = lows[s] ^ 0x80808080u, high = highs[s] ^ 0x80808080u;
        const half2 low_scale = __low2half2(bits_as<half2>(scale[0]));
        const half2 high_scale = __high2half2(bits_as<half2>(scale[0]));
        a[0] = bits_as<uint32_t>(__hmul2(bits_as<half2>(int8x2_to_fp16x2<0>(low)), low_scale));
        a[1] = bits_as<uint32_t>(__hmul2(bits_as<half2>(int8x2_to_fp16x2<0>(high)), high_scale));
        a[2] = bits_as<uint32_t>(__hmul2(bits_as<half2>(int8x2_to_fp16x2<1>(low)), low_scale));
        a[3] = bits_as<uint32_t>(__hmul2(bits_as<half2>(int8x2_to_fp16x2<1>(high)), high_scale));
      }
    }
  }
};

// One token's 16 elements of `source` that meet a lane's weights in a block of 64: words 2s and 2s + 1 belong to step
// s.
template <WeightFormat F>
__device__ __forceinline__ void load_lane_columns(const bf16* source, int block, int t, int cols, bool active,
                                                  uint32_t* words) {
  if constexpr (F == WeightFormat::int4) {
#pragma unroll
    for (int s = 0; s < 4; s++) {
      const int column = block * 64 + s * 16 + t * 4;
      const uint2 v = active && column < cols ? load_activation8(source + column) : make_uint2(0, 0);
      words[2 * s] = v.x, words[2 * s + 1] = v.y;
    }
  } else {
    const int column = block * 64 + t * 16;
#pragma unroll
    for (int i = 0; i < 2; i++) {
      const uint4 v = active && column < cols ? load_activation(source + column + 8 * i) : make_uint4(0, 0, 0, 0);
      words[4 * i] = v.x, words[4 * i + 1] = v.y, words[4 * i + 2] = v.z, words[4 * i + 3] = v.w;
    }
  }
}

template <WeightFormat F, int kTiles, int kTokenTiles, int kGroupsPerBlock>
__global__ void __launch_bounds__(kMmaWarps * 32, kTokenTiles == 1 ? 2 : 1) gemv_mma_kernel(const GemvParams p) {
  constexpr int kDepth = 16 / (kTiles * MmaFormat<F>::loads) < 2   ? 2
                         : 16 / (kTiles * MmaFormat<F>::loads) > 4 ? 4
                                                                   : 16 / (kTiles * MmaFormat<F>::loads);
  constexpr int kXDepth = 2;  // x comes from L2 or L1: a shorter way
  constexpr int kTokens = 8 * kTokenTiles;
  constexpr int kStride = kTiles * kMmaRows + 4;  // conflict-free for the fragments' order
  __shared__ float partial[kMmaWarps][kTokens][kStride];
  __shared__ float partial_squares[kMmaWarps][kTokens];
  const int lane = threadIdx.x & 31, warp = warp_index(), g = lane >> 2, t = lane & 3;
  const int num_blocks = ceil_div(p.cols, 64);
  const int first_tile = blockIdx.x * kTiles;
  const bool has_norm = p.gain != nullptr;

  MmaWeights<F, kGroupsPerBlock> ring[kDepth][kTiles];
#pragma unroll
  for (int d = 0; d < kDepth; d++) {
    const int block = warp + d * kMmaWarps;
#pragma unroll
    for (int m = 0; m < kTiles; m++) {
      if (block < num_blocks) ring[d][m].load(p, min(first_tile + m, p.num_blocks - 1), block, lane);
    }
  }
  // A warp finishes the same tile for all its tokens.
  static_assert(kMmaWarps % kTiles == 0);
  const int own_tile = first_tile + warp % kTiles;
  const int own_row = block_row<kMmaRows>(p, min(own_tile, p.num_blocks - 1), lane & (kMmaRows - 1));
  RowConstants<F> constants;
  constants.load(p, own_row);
  start_dependents();
  wait_for_predecessor();

  uint32_t x[kXDepth][kTokenTiles][8];
#pragma unroll
  for (int d = 0; d < kXDepth; d++) {
#pragma unroll
    for (int n = 0; n < kTokenTiles; n++) {
      const int token = n * 8 + g;
      load_lane_columns<F>(p.x + static_cast<std::size_t>(token) * p.cols, warp + d * kMmaWarps, t, p.cols,
                           token < p.num_tokens, x[d][n]);
    }
  }
  float old_residual[kTiles * kTokenTiles];
#pragma unroll
  for (int i = 0; i < kTiles * kTokenTiles; i++) {
    const int token = (warp + i * kMmaWarps) / kTiles;
    old_residual[i] = token < p.num_tokens && own_tile < p.num_blocks ? load_residual(p, token, own_row) : 0.0f;
  }

  float sums[kTiles][kTokenTiles][4] = {};
  float squares[kTokenTiles] = {};
  for (int first = warp; first < num_blocks; first += kMmaWarps * kDepth) {
#pragma unroll
    for (int d = 0; d < kDepth; d++) {
      const int block = first + d * kMmaWarps;
      if (block >= num_blocks) break;
      uint32_t b[kTokenTiles][8];
      uint32_t gain[8];
      if (has_norm) load_lane_columns<F>(p.gain, block, t, p.cols, true, gain);
#pragma unroll
      for (int n = 0; n < kTokenTiles; n++) {
        const int token = n * 8 + g;
#pragma unroll
        for (int i = 0; i < 8; i++) b[n][i] = x[d % kXDepth][n][i];
        load_lane_columns<F>(p.x + static_cast<std::size_t>(token) * p.cols, block + kXDepth * kMmaWarps, t, p.cols,
                             token < p.num_tokens, x[d % kXDepth][n]);
        if (has_norm || !MmaFormat<F>::is_bf16) {
#pragma unroll
          for (int i = 0; i < 8; i++) {
            float low = low_float(b[n][i]), high = high_float(b[n][i]);
            if (has_norm) {
              squares[n] = fmaf(low, low, fmaf(high, high, squares[n]));
              low *= low_float(gain[i]), high *= high_float(gain[i]);
            }
            b[n][i] = MmaFormat<F>::is_bf16 ? pack_bf16(low, high) : pack_fp16(low * kXScale, high * kXScale);
          }
        }
      }
#pragma unroll
      for (int m = 0; m < kTiles; m++) {
        if constexpr (MmaFormat<F>::sums_groups) {
#pragma unroll
          for (int i = 0; i < kGroupsPerBlock; i++) {
            float2 scale;
            if constexpr (F == WeightFormat::int4) {
              scale = unpack_fp16(ring[d][m].scale[i]);
            } else {
              scale = make_float2(__uint_as_float(ring[d][m].scale[0]), __uint_as_float(ring[d][m].scale[1]));
            }
            float group_sums[kTokenTiles][4] = {};
#pragma unroll
            for (int s = i * 4 / kGroupsPerBlock; s < (i + 1) * 4 / kGroupsPerBlock; s++) {
              uint32_t a[4];
              ring[d][m].fragment(s, a);
#pragma unroll
              for (int n = 0; n < kTokenTiles; n++) {
                if constexpr (MmaFormat<F>::is_bf16) {
                  mma_bf16(group_sums[n], a, b[n][2 * s], b[n][2 * s + 1]);
                } else {
                  mma_fp16(group_sums[n], a, b[n][2 * s], b[n][2 * s + 1]);
                }
              }
            }
#pragma unroll
            for (int n = 0; n < kTokenTiles; n++) {
              sums[m][n][0] = fmaf(scale.x, group_sums[n][0], sums[m][n][0]);
              sums[m][n][1] = fmaf(scale.x, group_sums[n][1], sums[m][n][1]);
              sums[m][n][2] = fmaf(scale.y, group_sums[n][2], sums[m][n][2]);
              sums[m][n][3] = fmaf(scale.y, group_sums[n][3], sums[m][n][3]);
            }
          }
        } else {
#pragma unroll
          for (int s = 0; s < 4; s++) {
            uint32_t a[4];
            ring[d][m].fragment(s, a);
#pragma unroll
            for (int n = 0; n < kTokenTiles; n++) {
              if constexpr (MmaFormat<F>::is_bf16) {
                mma_bf16(sums[m][n], a, b[n][2 * s], b[n][2 * s + 1]);
              } else {
                mma_fp16(sums[m][n], a, b[n][2 * s], b[n][2 * s + 1]);
              }
            }
          }
        }
        const int next = block + kDepth * kMmaWarps;
        if (next < num_blocks) ring[d][m].load(p, min(first_tile + m, p.num_blocks - 1), next, lane);
      }
    }
  }

#pragma unroll
  for (int n = 0; n < kTokenTiles; n++) {
    squares[n] += __shfl_xor_sync(kAllLanes, squares[n], 1);
    squares[n] += __shfl_xor_sync(kAllLanes, squares[n], 2);
    if (t == 0) partial_squares[warp][n * 8 + g] = squares[n];
#pragma unroll
    for (int m = 0; m < kTiles; m++) {
#pragma unroll
      for (int i = 0; i < 4; i++) {
        partial[warp][n * 8 + 2 * t + (i & 1)][m * kMmaRows + g + 8 * (i >> 1)] = sums[m][n][i];
      }
    }
  }
  __syncthreads();
#pragma unroll
  for (int i = 0; i < kTiles * kTokenTiles; i++) {
    const int token = (warp + i * kMmaWarps) / kTiles;
    if (token >= p.num_tokens || own_tile >= p.num_blocks) continue;
    const int r = lane & (kMmaRows - 1);
    float y = 0.0f, total = 0.0f;
#pragma unroll
    for (int w = 0; w < kMmaWarps; w++) {
      y += partial[w][token][warp % kTiles * kMmaRows + r];
      total += partial_squares[w][token];
    }
    if (has_norm) y *= rsqrtf(total * p.inverse_cols + p.norm_eps);
    if constexpr (!MmaFormat<F>::is_bf16) y *= 1.0f / kXScale;
    finish_rows<kMmaRows>(p, constants.apply(y), lane, token, own_tile, own_row, old_residual[i]);
  }
}

template <WeightFormat F, int kTiles, int kTokenTiles, int kGroupsPerBlock>
void launch_mma_kernel(const GemvArgs& args, cudaStream_t stream, bool pdl) {
  launch(gemv_mma_kernel<F, kTiles, kTokenTiles, kGroupsPerBlock>, dim3(ceil_div(gemv_blocks(args, kMmaRows), kTiles)),
         dim3(kMmaWarps * 32), 0, stream, pdl, gemv_params(args, kMmaRows));
}

template <WeightFormat F, int kGroupsPerBlock>
void launch_mma_config(const GemvArgs& args, const GemvTile& tile, cudaStream_t stream, bool pdl) {
  const bool two_tiles = kMmaConfigs[tile.config] == 2;
  constexpr bool kOnlyMany = MmaFormat<F>::is_16bit || F == WeightFormat::fp8;
  assert(!kOnlyMany || args.num_tokens > kMaxTensorTokens);
  if (kOnlyMany || args.num_tokens > 8) {
    if (two_tiles) return launch_mma_kernel<F, 2, 2, kGroupsPerBlock>(args, stream, pdl);
    return launch_mma_kernel<F, 1, 2, kGroupsPerBlock>(args, stream, pdl);
  }
  if constexpr (!kOnlyMany) {
    if (two_tiles) return launch_mma_kernel<F, 2, 1, kGroupsPerBlock>(args, stream, pdl);
    launch_mma_kernel<F, 1, 1, kGroupsPerBlock>(args, stream, pdl);
  }
}

}  // namespace edgellm::kernels
