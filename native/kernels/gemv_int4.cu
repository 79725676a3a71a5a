// One token and int4 weights on the integer tensor cores.
//
// A block has kTiles packed tiles of 16 rows; its warps have contiguous shares of the input features. Weights come in
// the order of quantized.cu, 512 contiguous bytes a warp and load, in which the low and the high nibbles of a word are,
// by one mask each, fragments of mma.m16n8k32 for signed bytes. x becomes a fixed-point number of 15 bits in blocks of
// 64 with a power of two as their scale (its error is a 32,768th of the block's largest number, 64 times less than
// bf16's), split into two signed bytes that are two columns of the product: sums of a group are exact integers.
#include "gemv_mma.cuh"

namespace edgellm::kernels {

// 16-byte loads of x in flight a lane: 256 input features a warp each. With a norm the gain has as many.
template <bool kNorm>
constexpr int kStagedLoads = kNorm ? 2 : 4;
// 32-bit words of a staged block of 64: [digit: low, high][t][step] four bytes, then 1 / scale; padded so that 16-byte
// reads stay aligned and the writes of four blocks spread over the banks.
constexpr int kStagedWords = 36;
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

// Stages blocks first to last - 1 of 64 input features; returns the lane's share of the sum of squares (with kNorm).
// kLoads 16-byte loads a lane are in flight at once; `gain` holds those of the first pass, the only one with kOnce.
template <int kLoads, bool kOnce, bool kNorm>
__device__ __forceinline__ float stage_x(const GemvParams& p, const uint4* gain, int first, int last, int lane,
                                         uint32_t* staged) {
  const int end = min(last * 8, p.cols / 8);
  float squares = 0.0f;
  int begin = first * 8;
  do {
    uint4 x[kLoads];
#pragma unroll
    for (int i = 0; i < kLoads; i++) {
      const int chunk = begin + i * 32 + lane;
      x[i] = chunk < end ? load_activation(p.x + chunk * 8) : make_uint4(0, 0, 0, 0);
    }
#pragma unroll
    for (int i = 0; i < kLoads; i++) {
      const int chunk = begin + i * 32 + lane;
      float xs[8];
      unpack_bf16(x[i], xs);
      if constexpr (kNorm) {
        uint4 g8 = gain[i];
        if (!kOnce && begin != first * 8) {
          g8 = chunk < end ? load_constant(p.gain + chunk * 8) : make_uint4(0, 0, 0, 0);
        }
        float gains[8];
        unpack_bf16(g8, gains);
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
      if (chunk < last * 8) {
        uint32_t* block = staged + (chunk >> 3) * kStagedWords;
        uint32_t* at = block + (chunk & 1) * 8 + ((chunk >> 1) & 3);
        at[0] = gather_bytes<0>(low);
        at[4] = gather_bytes<0>(low + 4);
        at[16] = gather_bytes<1>(high);
        at[20] = gather_bytes<1>(high + 4);
        // Also undoes the 16 of the weights. What is not finite must show in the result.
        const uint32_t inverse = exponent == 255 ? 0x7fc00000u : (exponent - (kFixedBits - 1) - 4) << 23;
        if ((chunk & 7) == 0) block[32] = inverse;
      }
    }
    begin += 32 * kLoads;
  } while (!kOnce && begin < last * 8);
  return squares;
}

template <int kWarps, int kDepth, int kTiles, int kMinBlocks, bool kOnce, int kGroupsPerBlock, bool kNorm>
__global__ void __launch_bounds__(kWarps * 32, kMinBlocks) gemv_int4_kernel(const GemvParams p) {
  constexpr int kRows = kTiles * kMmaRows;
  constexpr int kLoads = kOnce ? ceil_div(kDepth, 4) : kStagedLoads<kNorm>;
  extern __shared__ uint4 staged[];             // x, normed but for the division by the rms
  __shared__ float partial[kWarps][kRows + 1];  // last: sum of squares
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
  // Warp m finishes tile m.
  const int own_tile = min(first_tile + warp, p.num_blocks - 1);
  const int own_row = block_row<kMmaRows>(p, own_tile, lane & (kMmaRows - 1));
  RowConstants<WeightFormat::int4> constants;
  if (warp < kTiles) constants.load(p, own_row);
  start_dependents();
  wait_for_predecessor();

  const float old_residual = warp < kTiles ? load_residual(p, 0, own_row) : 0.0f;
  float squares = stage_x<kLoads, kOnce, kNorm>(p, gain, first, last, lane, reinterpret_cast<uint32_t*>(staged));
  __syncwarp();

  uint32_t signs;
  asm("mov.b32 %0,0x80808080;" : "=r"(signs));
  float sums[kTiles][2] = {};  // rows g and g + 8
  int begin = first;
  do {
#pragma unroll
    for (int d = 0; d < kDepth; d++) {
      const int block = begin + d;
      if (block >= last) break;
      // Column 2 j of the product is of the low bytes, column 2 j + 1 of the high ones, all j alike.
      const uint4 x = staged[block * (kStagedWords / 4) + (g & 1) * 4 + t];
      const float inverse = reinterpret_cast<const float*>(staged)[block * kStagedWords + 32];
      const uint32_t xs[4] = {x.x, x.y, x.z, x.w};
#pragma unroll
      for (int m = 0; m < kTiles; m++) {
        const uint32_t words[4] = {ring[d][m].x, ring[d][m].y, ring[d][m].z, ring[d][m].w};
        uint32_t a[4][2];
#pragma unroll
        for (int s = 0; s < 4; s++) {
          a[s][0] = weights_times_16(words[s] << 4, signs);
          a[s][1] = weights_times_16(words[s], signs);
        }
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
          const float2 scale = unpack_fp16(scale_ring[d][m][i]);
          sums[m][0] = fmaf(scale.x * inverse, static_cast<float>(products[1] * 256 + products[0]), sums[m][0]);
          sums[m][1] = fmaf(scale.y * inverse, static_cast<float>(products[3] * 256 + products[2]), sums[m][1]);
        }
      }
      if (!kOnce && block + kDepth < last) load(d, block + kDepth, kDepth + d);
    }
    begin += kDepth;
#pragma unroll
    for (int m = 0; m < kTiles; m++) weights[m] += kDepth * 32;
  } while (!kOnce && begin < last);
  if constexpr (kNorm) squares = warp_sum(squares);
  if (t == 0) {
#pragma unroll
    for (int m = 0; m < kTiles; m++) {
      partial[warp][m * kMmaRows + g] = sums[m][0];
      partial[warp][m * kMmaRows + g + 8] = sums[m][1];
    }
  }
  if (lane == 0) partial[warp][kRows] = squares;
  __syncthreads();
  if (warp >= kTiles || first_tile + warp >= p.num_blocks) return;
  float y = 0.0f, total = 0.0f;
  const int half = lane >> 4;
#pragma unroll
  for (int w = 0; w < kWarps; w += 2) {
    y += partial[w + half][warp * kMmaRows + (lane & (kMmaRows - 1))];
    if constexpr (kNorm) total += partial[w + half][kRows];
  }
  y += __shfl_xor_sync(kAllLanes, y, 16);
  if constexpr (kNorm) {
    total += __shfl_xor_sync(kAllLanes, total, 16);
    y *= rsqrtf(total * p.inverse_cols + p.norm_eps);
  }
  y = constants.apply(y);
  finish_rows<kMmaRows>(p, y, lane, 0, first_tile + warp, own_row, old_residual);
}

namespace {

template <int kConfig, int kGroupsPerBlock, bool kNorm>
void launch_config(const GemvArgs& args, cudaStream_t stream, bool pdl) {
  constexpr Int4Config c = kInt4Configs[kConfig];
  constexpr int kMinBlocks = kGroupsPerBlock == 1 || c.min_blocks < 3 ? c.min_blocks : c.min_blocks - 2;
  const std::size_t num_blocks = static_cast<std::size_t>(ceil_div(args.weight.cols, 64));
  launch(gemv_int4_kernel<c.warps, c.depth, c.tiles, kMinBlocks, c.once, kGroupsPerBlock, kNorm>,
         dim3(ceil_div(gemv_blocks(args, kMmaRows), c.tiles)), dim3(c.warps * 32),
         num_blocks * kStagedWords * sizeof(uint32_t), stream, pdl, gemv_params(args, kMmaRows));
}

template <int kGroupsPerBlock, bool kNorm, int kConfig = 0>
void launch_groups(const GemvArgs& args, const GemvTile& tile, cudaStream_t stream, bool pdl) {
  if (tile.config == kConfig) return launch_config<kConfig, kGroupsPerBlock, kNorm>(args, stream, pdl);
  if constexpr (kConfig + 1 < (kGroupsPerBlock == 1 ? kNumInt4Configs : kNumInt4SmallGroupConfigs)) {
    launch_groups<kGroupsPerBlock, kNorm, kConfig + 1>(args, tile, stream, pdl);
  }
}

template <int kGroupsPerBlock>
void launch_norm(const GemvArgs& args, const GemvTile& tile, cudaStream_t stream, bool pdl) {
  if (args.gain) return launch_groups<kGroupsPerBlock, true>(args, tile, stream, pdl);
  launch_groups<kGroupsPerBlock, false>(args, tile, stream, pdl);
}

}  // namespace

void launch_gemv_int4(const GemvArgs& args, const GemvTile& tile, cudaStream_t stream, bool pdl) {
  if (args.weight.group >= 64) return launch_norm<1>(args, tile, stream, pdl);
  if (args.weight.group == 32) return launch_norm<2>(args, tile, stream, pdl);
  launch_norm<4>(args, tile, stream, pdl);
}

template <>
void launch_gemv_mma<WeightFormat::int4>(const GemvArgs& args, const GemvTile& tile, cudaStream_t stream, bool pdl) {
  if (args.weight.group >= 64) return launch_mma_config<WeightFormat::int4, 1>(args, tile, stream, pdl);
  if (args.weight.group == 32) return launch_mma_config<WeightFormat::int4, 2>(args, tile, stream, pdl);
  launch_mma_config<WeightFormat::int4, 4>(args, tile, stream, pdl);
}

}  // namespace edgellm::kernels
