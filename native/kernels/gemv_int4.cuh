// One to four tokens and int4 weights on the integer tensor cores.
//
// A block has kTiles packed tiles of 16 rows; its warps have contiguous shares of the input features. Weights come in
// the order of quantized.cu, 512 contiguous bytes a warp and load, in which the low and the high nibbles of a word are,
// by one mask each, fragments of mma.m16n8k32 for signed bytes. x becomes a fixed-point number of 15 bits in blocks of
// 64 with a power of two as their scale (its error is a 32,768th of the block's largest number, 64 times less than
// bf16's), split into two signed bytes that are two columns of the product: sums of a group are exact integers. A
// token's result has the same bits alone and beside others.
#pragma once

#include "gemv_common.cuh"
#include "launch.hpp"

namespace edgellm::kernels {

// 16-byte loads of x in flight a lane: 256 input features a warp each. With a norm the gain has as many.
template <bool kNorm>
constexpr int kStagedLoads = kNorm ? 2 : 4;
constexpr int kFixedBits = 14;
constexpr float kRoundToInt = 12582912.0f;  // 1.5 * 2^23: the sum's low bits are the rounded number
constexpr uint32_t kSmallestExponent = 20;  // biased; blocks of smaller numbers than 2^-106 are as good as zero

__device__ __forceinline__ void mma_int8(int* d, uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0,
                                         uint32_t b1) {
  asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};"
      : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}
__device__ __forceinline__ void mma_int8(int* d, uint32_t a0, uint32_t a1, uint32_t b0) {
  asm("mma.sync.aligned.m16n8k16.row.col.s32.s8.s8.s32 {%0,%1,%2,%3},{%4,%5},{%6},{%0,%1,%2,%3};"
      : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
      : "r"(a0), "r"(a1), "r"(b0));
}

// Four weights of row g + 8 of a packed word (shifted left by 4: of row g) as signed bytes, times 16: a nibble is the
// weight + 8. `signs` is 0x80808080 in a register: one operation takes one constant only.
__device__ __forceinline__ uint32_t weights_times_16(uint32_t word, uint32_t signs) {
  uint32_t bytes;
  asm("lop3.b32 %0,%1,%2,0xf0f0f0f0,0x28;" : "=r"(bytes) : "r"(word), "r"(signs));  // (word ^ signs) & mask
  return bytes;
}

// Bytes kByte of four words, in the order that a packed word has its weights: 0, 2, 1, 3.
template <int kByte>
__device__ __forceinline__ uint32_t gather_bytes(const uint32_t* words) {
  constexpr uint32_t kPair = kByte | (4 + kByte) << 4;
  const uint32_t even = __byte_perm(words[0], words[2], kPair), odd = __byte_perm(words[1], words[3], kPair);
  return __byte_perm(even, odd, 0x5410);
}

// Eight x values, number `eight` of a block of 64 whose others the lane's neighbours have, as fixed-point numbers into
// the staged block, if it is `inside` the row. Adds to the sum of squares (with kNorm).
template <bool kNorm>
__device__ __forceinline__ void stage_eight(const uint4& x, const uint4& gain, int eight, bool inside, uint32_t* block,
                                            float& squares) {
  float xs[8];
  unpack_bf16(x, xs);
  if constexpr (kNorm) {
    float gains[8];
    unpack_bf16(gain, gains);
#pragma unroll
    for (int j = 0; j < 8; j++) {
      squares = fmaf(xs[j], xs[j], squares);
      xs[j] *= gains[j];
    }
  }
  uint32_t largest = 0;  // its bits: a NaN is larger than infinity, and that than any number
#pragma unroll
  for (int j = 0; j < 8; j++) largest = max(largest, __float_as_uint(xs[j]) & 0x7fffffffu);
#pragma unroll
  for (int s = 1; s < 8; s <<= 1) largest = max(largest, __shfl_xor_sync(kAllLanes, largest, s));
  const uint32_t exponent = max(largest >> 23, kSmallestExponent);
  const float scale = __uint_as_float((254 + kFixedBits - 1 - exponent) << 23);
  uint32_t low[8], high[8];
#pragma unroll
  for (int j = 0; j < 8; j++) {
    low[j] = __float_as_uint(fmaf(xs[j], scale, kRoundToInt));
    high[j] = low[j] + 128u;  // the low byte is signed
  }
  if (!inside) return;
  uint32_t* at = block + (eight & 1) * 8 + (eight >> 1);
  at[0] = gather_bytes<0>(low);
  at[4] = gather_bytes<0>(low + 4);
  at[16] = gather_bytes<1>(high);
  at[20] = gather_bytes<1>(high + 4);
  // Also undoes the 16 of the weights. What is not finite must show in the result.
  const uint32_t inverse = exponent == 255 ? 0x7fc00000u : (exponent - (kFixedBits - 1) - 4) << 23;
  if (eight == 0) block[32] = inverse;
}

// Stages blocks first to last - 1 of 64 input features of one token's x; returns the lane's share of the sum of squares
// (with kNorm). kLoads 16-byte loads a lane are in flight at once; `gain` holds those of the first pass, the only one
// with kOnce.
template <int kLoads, bool kOnce, bool kNorm>
__device__ __forceinline__ float stage_x(const GemvParams& p, const bf16* source, const uint4* gain, int first,
                                         int last, int lane, uint32_t* staged) {
  const int end = min(last * 8, p.cols / 8);
  float squares = 0.0f;
  int begin = first * 8;
  do {
    uint4 x[kLoads];
#pragma unroll
    for (int i = 0; i < kLoads; i++) {
      const int chunk = begin + i * 32 + lane;
      x[i] = chunk < end ? load_activation(source + chunk * 8) : make_uint4(0, 0, 0, 0);
    }
#pragma unroll
    for (int i = 0; i < kLoads; i++) {
      const int chunk = begin + i * 32 + lane;
      uint4 gains = make_uint4(0, 0, 0, 0);
      if constexpr (kNorm) {
        gains = gain[i];
        if (!kOnce && begin != first * 8) {
          gains = chunk < end ? load_constant(p.gain + chunk * 8) : make_uint4(0, 0, 0, 0);
        }
      }
      stage_eight<kNorm>(x[i], gains, chunk & 7, chunk < last * 8, staged + (chunk >> 3) * kInt4StagedWords, squares);
    }
    begin += 32 * kLoads;
  } while (!kOnce && begin < last * 8);
  return squares;
}

// A lane's words of a tile's 64 input features as fragments of the products' four steps.
__device__ __forceinline__ void unpack_tile(const uint4& words4, uint32_t signs, uint32_t (*a)[2]) {
  const uint32_t words[4] = {words4.x, words4.y, words4.z, words4.w};
#pragma unroll
  for (int s = 0; s < 4; s++) {
    a[s][0] = weights_times_16(words[s] << 4, signs);
    a[s][1] = weights_times_16(words[s], signs);
  }
}
// Adds their products with four tokens, two digits each, of which lane t of a quad gets token t's: rows g and g + 8.
template <int kGroupsPerBlock>
__device__ __forceinline__ void add_int4_products(const uint32_t (*a)[2], const uint32_t* xs, float inverse,
                                                  const uint32_t* scales, float* sums) {
#pragma unroll
  for (int i = 0; i < kGroupsPerBlock; i++) {
    int products[4] = {};
    if constexpr (kGroupsPerBlock == 4) {
      mma_int8(products, a[i][0], a[i][1], xs[i]);
    } else {
#pragma unroll
      for (int s = i * 4 / kGroupsPerBlock; s < (i + 1) * 4 / kGroupsPerBlock; s += 2) {
        mma_int8(products, a[s][0], a[s][1], a[s + 1][0], a[s + 1][1], xs[s], xs[s + 1]);
      }
    }
    const float2 scale = unpack_fp16(scales[i]);
    sums[0] = fmaf(scale.x * inverse, static_cast<float>(products[1] * 256 + products[0]), sums[0]);
    sums[1] = fmaf(scale.y * inverse, static_cast<float>(products[3] * 256 + products[2]), sums[1]);
  }
}

// The warps' sums of one token's `tile` of the block's, partial[warp][token][row] with the sum of squares last, to the
// finished sum of row lane % 16.
template <int kWarps, bool kNorm, class Partial>
__device__ __forceinline__ float finish_int4_sum(const GemvParams& p, const RowConstants<WeightFormat::int4>& constants,
                                                 const Partial& partial, int squares_at, int token, int tile,
                                                 int lane) {
  float y = 0.0f, total = 0.0f;
  const int half = lane >> 4;
#pragma unroll
  for (int w = 0; w < kWarps; w += 2) {
    y += partial[w + half][token][tile * kMmaRows + (lane & (kMmaRows - 1))];
    if constexpr (kNorm) total += partial[w + half][token][squares_at];
  }
  y += __shfl_xor_sync(kAllLanes, y, 16);
  if constexpr (kNorm) {
    total += __shfl_xor_sync(kAllLanes, total, 16);
    y *= rsqrtf(total * p.inverse_cols + p.norm_eps);
  }
  return constants.apply(y);
}

template <int kWarps, int kDepth, int kTiles, int kMinBlocks, bool kOnce, int kGroupsPerBlock, bool kNorm,
          int kMaxTokens>
__global__ void __launch_bounds__(kWarps * 32, kMinBlocks) gemv_int4_kernel(const GemvParams p) {
  constexpr int kRows = kTiles * kMmaRows;
  constexpr int kLoads = kOnce ? ceil_div(kDepth, 4) : kStagedLoads<kNorm>;
  constexpr int kJobs = ceil_div(kTiles * kMaxTokens, kWarps);  // tiles of one token that a warp finishes
  static_assert(kWarps % kTiles == 0);
  extern __shared__ uint4 staged[];  // (num_tokens, num_blocks): x, normed but for the division by the rms
  __shared__ float partial[kWarps][kMaxTokens][kRows + 1];  // last: sum of squares
  const int lane = threadIdx.x & 31, warp = warp_index(), g = lane >> 2, t = lane & 3;
  const int num_blocks = ceil_div(p.cols, 64), share = ceil_div(num_blocks, kWarps);
  const int first = warp * share, last = min(num_blocks, first + share);  // this warp's blocks of 64
  const int first_tile = blockIdx.x * kTiles;

  const uint4* weights[kTiles];
  const uint32_t* scales[kTiles];
  const int num_groups = kGroupsPerBlock == 1 ? p.cols >> p.group_shift : num_blocks * kGroupsPerBlock;
#pragma unroll
  for (int m = 0; m < kTiles; m++) {
    const int tile = min(first_tile + m, p.num_blocks - 1);
    weights[m] = static_cast<const uint4*>(p.data) + (static_cast<std::size_t>(tile) * num_blocks + first) * 32 + lane;
    scales[m] = static_cast<const uint32_t*>(p.scales) + static_cast<std::size_t>(tile) * num_groups * 8 + g;
  }
  uint4 ring[kDepth][kTiles];
  uint32_t scale_ring[kDepth][kTiles][kGroupsPerBlock];  // fp16 of rows g and g + 8
  const auto load = [&](int d, int block, int ahead) {   // block `ahead` from where `weights` points to
#pragma unroll
    for (int m = 0; m < kTiles; m++) {
      ring[d][m] = load_once(weights[m] + ahead * 32);
#pragma unroll
      for (int i = 0; i < kGroupsPerBlock; i++) {
        const int group = kGroupsPerBlock == 1 ? block >> (p.group_shift - 6) : block * kGroupsPerBlock + i;
        scale_ring[d][m][i] = __ldg(scales[m] + group * 8);
      }
    }
  };
#pragma unroll
  for (int d = 0; d < kDepth; d++) {
    if (first + d < last) load(d, first + d, d);
  }
  uint4 gain[kNorm ? kLoads : 1];
  if constexpr (kNorm) {
#pragma unroll
    for (int i = 0; i < kLoads; i++) {
      const int chunk = first * 8 + i * 32 + lane;
      gain[i] = chunk < last * 8 && chunk * 8 < p.cols ? load_constant(p.gain + chunk * 8) : make_uint4(0, 0, 0, 0);
    }
  }
  // A warp finishes the same tile for all its tokens.
  const int own_tile = first_tile + warp % kTiles, first_token = warp / kTiles;
  const int own_row = block_row<kMmaRows>(p, min(own_tile, p.num_blocks - 1), lane & (kMmaRows - 1));
  const int num_tokens = kMaxTokens == 1 ? 1 : p.num_tokens;
  RowConstants<WeightFormat::int4> constants;
  if (first_token < num_tokens) constants.load(p, own_row);
  start_dependents();
  wait_for_predecessor();

  float old_residual[kJobs];
#pragma unroll
  for (int i = 0; i < kJobs; i++) {
    const int token = first_token + i * (kWarps / kTiles);
    old_residual[i] = token < num_tokens ? load_residual(p, token, own_row) : 0.0f;
  }
  const int token_words = num_blocks * kInt4StagedWords;
  float squares[kMaxTokens] = {};
#pragma unroll
  for (int token = 0; token < kMaxTokens; token++) {
    if (token >= num_tokens) break;
    squares[token] = stage_x<kLoads, kOnce, kNorm>(p, p.x + static_cast<std::size_t>(token) * p.cols, gain, first, last,
                                                   lane, reinterpret_cast<uint32_t*>(staged) + token * token_words);
  }
  __syncwarp();

  uint32_t signs;
  asm("mov.b32 %0,0x80808080;" : "=r"(signs));
  // Columns 2 j and 2 j + 1 of the product are token j's low and high bytes; lane t of a quad gets token t's. Columns
  // without a token repeat the last one.
  const uint4* columns = staged + min(g >> 1, num_tokens - 1) * (token_words / 4) + (g & 1) * 4 + t;
  const float* inverses = reinterpret_cast<const float*>(staged) + min(t, num_tokens - 1) * token_words + 32;
  float sums[kTiles][2] = {};  // rows g and g + 8
  int begin = first;
  do {
#pragma unroll
    for (int d = 0; d < kDepth; d++) {
      const int block = begin + d;
      if (block >= last) break;
      const uint4 x = columns[block * (kInt4StagedWords / 4)];
      const float inverse = inverses[block * kInt4StagedWords];
      const uint32_t xs[4] = {x.x, x.y, x.z, x.w};
#pragma unroll
      for (int m = 0; m < kTiles; m++) {
        uint32_t a[4][2];
        unpack_tile(ring[d][m], signs, a);
        add_int4_products<kGroupsPerBlock>(a, xs, inverse, scale_ring[d][m], sums[m]);
      }
      if (!kOnce && block + kDepth < last) load(d, block + kDepth, kDepth + d);
    }
    begin += kDepth;
#pragma unroll
    for (int m = 0; m < kTiles; m++) weights[m] += kDepth * 32;
  } while (!kOnce && begin < last);
#pragma unroll
  for (int token = 0; token < kMaxTokens; token++) {
    if (token >= num_tokens) break;
    if constexpr (kNorm) squares[token] = warp_sum(squares[token]);
    if (t == token) {
#pragma unroll
      for (int m = 0; m < kTiles; m++) {
        partial[warp][token][m * kMmaRows + g] = sums[m][0];
        partial[warp][token][m * kMmaRows + g + 8] = sums[m][1];
      }
    }
    if (lane == 0) partial[warp][token][kRows] = squares[token];
  }
  __syncthreads();
#pragma unroll
  for (int i = 0; i < kJobs; i++) {
    const int token = first_token + i * (kWarps / kTiles);
    if (token >= num_tokens || own_tile >= p.num_blocks) return;
    const float y = finish_int4_sum<kWarps, kNorm>(p, constants, partial, kRows, token, warp % kTiles, lane);
    finish_rows<kMmaRows>(p, y, lane, token, own_tile, own_row, old_residual[i]);
  }
}

template <int kConfig, int kGroupsPerBlock, bool kNorm, int kMaxTokens>
void launch_int4_config(const GemvArgs& args, cudaStream_t stream, bool pdl) {
  constexpr Int4Config c = kInt4Configs[kConfig];
  constexpr int kMinBlocks = kGroupsPerBlock == 1 || c.min_blocks < 3 ? c.min_blocks : c.min_blocks - 2;
  const auto kernel =
      gemv_int4_kernel<c.warps, c.depth, c.tiles, kMinBlocks, c.once, kGroupsPerBlock, kNorm, kMaxTokens>;
  const std::size_t shared_bytes = int4_staged_bytes(args.weight.cols) * args.num_tokens;
  if (shared_bytes > kPlainSharedBytes) {
    EDGELLM_CUDA_TRY(
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes)));
  }
  launch(kernel, dim3(ceil_div(gemv_blocks(args, kMmaRows), c.tiles)), dim3(c.warps * 32), shared_bytes, stream, pdl,
         gemv_params(args, kMmaRows));
}

template <int kGroupsPerBlock, bool kNorm, int kMaxTokens, int kConfig = 0>
void launch_int4_configs(const GemvArgs& args, const GemvTile& tile, cudaStream_t stream, bool pdl) {
  if (tile.config == kConfig) {
    return launch_int4_config<kConfig, kGroupsPerBlock, kNorm, kMaxTokens>(args, stream, pdl);
  }
  if constexpr (kConfig + 1 < (kGroupsPerBlock == 1 ? kNumInt4Configs : kNumInt4SmallGroupConfigs)) {
    launch_int4_configs<kGroupsPerBlock, kNorm, kMaxTokens, kConfig + 1>(args, tile, stream, pdl);
  }
}

template <int kGroupsPerBlock, int kMaxTokens>
void launch_int4(const GemvArgs& args, const GemvTile& tile, cudaStream_t stream, bool pdl) {
  if (args.gain) return launch_int4_configs<kGroupsPerBlock, true, kMaxTokens>(args, tile, stream, pdl);
  launch_int4_configs<kGroupsPerBlock, false, kMaxTokens>(args, tile, stream, pdl);
}

// Several tokens, groups of 64 and more; `warps` of the choice for one token, on which a token's bits depend.
void launch_int4_ring(const GemvArgs& args, int warps, cudaStream_t stream, bool pdl);

// One translation unit each, so that they compile side by side.
void launch_int4_one(const GemvArgs& args, const GemvTile& tile, cudaStream_t stream, bool pdl);
void launch_int4_small_groups(const GemvArgs& args, const GemvTile& tile, cudaStream_t stream, bool pdl);

}  // namespace edgellm::kernels
