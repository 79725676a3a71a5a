// One token and int4 weights on tensor cores: x is normed and staged once a warp, then only nibbles are unpacked.
//
// A block has kTiles packed tiles of 16 rows; its warps have contiguous shares of the input features. Weights come in
// the order of the fragments of mma.m16n8k16 (quantized.cu), 512 contiguous bytes a warp and load. A nibble u becomes
// the bf16 number 128 + u by one logic operation; what is too much, 136 times the sum of a group's x (the weight is
// u - 8), is subtracted from the group's sum, which has fp32 to spare.
#include "gemv_mma.cuh"

namespace edgellm::kernels {

// 16-byte loads of x in flight a lane: 256 input features a warp each. With a norm the gain has as many.
template <bool kNorm>
constexpr int kStagedLoads = kNorm ? 2 : 4;
constexpr float kNibbleOffset = 136.0f;

// Nibbles j of the low and the high half of `word`, plus 128, as two bf16.
__device__ __forceinline__ uint32_t nibbles_plus_128(uint32_t word, int j) {
  uint32_t magic;
  asm("lop3.b32 %0,%1,0x000f000f,0x43004300,0xEA;" : "=r"(magic) : "r"(word >> (4 * j)));
  return magic;
}

// The sum of the eight numbers as they are multiplied.
__device__ __forceinline__ float sum_bf16(const uint4& v) {
  float xs[8];
  unpack_bf16(v, xs);
  return ((xs[0] + xs[1]) + (xs[2] + xs[3])) + ((xs[4] + xs[5]) + (xs[6] + xs[7]));
}

// Stages blocks first to last - 1 of 64 input features: staged[block][t][step] is what lane t of a quad multiplies in a
// step; offsets[group] is what its sums have too much. Returns the lane's share of the sum of squares (with kNorm).
template <int kGroupsPerBlock, bool kNorm>
__device__ __forceinline__ float stage_x(const GemvParams& p, const uint4* gain, int first, int last, int lane,
                                         uint2* staged, float* offsets) {
  constexpr int kLanesPerGroup = 8 / kGroupsPerBlock;
  constexpr int kLoads = kStagedLoads<kNorm>;
  float squares = 0.0f;
  for (int begin = first * 8; begin < last * 8; begin += 32 * kLoads) {
    uint4 x[kLoads];
#pragma unroll
    for (int i = 0; i < kLoads; i++) {
      const int chunk = begin + i * 32 + lane;
      x[i] = chunk < last * 8 && chunk * 8 < p.cols ? load_activation(p.x + chunk * 8) : make_uint4(0, 0, 0, 0);
    }
#pragma unroll
    for (int i = 0; i < kLoads; i++) {
      const int chunk = begin + i * 32 + lane;
      if (begin + i * 32 >= last * 8) break;  // the whole warp
      if constexpr (kNorm) {
        uint4 g8 = gain[i];
        if (begin != first * 8) {
          g8 = chunk < last * 8 && chunk * 8 < p.cols ? load_constant(p.gain + chunk * 8) : make_uint4(0, 0, 0, 0);
        }
        float xs[8], gains[8];
        unpack_bf16(x[i], xs);
        unpack_bf16(g8, gains);
#pragma unroll
        for (int j = 0; j < 8; j++) {
          squares = fmaf(xs[j], xs[j], squares);
          xs[j] *= gains[j];
        }
        x[i] = make_uint4(pack_bf16(xs[0], xs[1]), pack_bf16(xs[2], xs[3]), pack_bf16(xs[4], xs[5]),
                          pack_bf16(xs[6], xs[7]));
      }
      float sum = sum_bf16(x[i]);
#pragma unroll
      for (int s = 1; s < kLanesPerGroup; s <<= 1) sum += __shfl_xor_sync(kAllLanes, sum, s);
      if (chunk < last * 8) {
        uint2* at = staged + (chunk >> 3) * 16 + (chunk & 1) * 8 + ((chunk >> 1) & 3);
        at[0] = make_uint2(x[i].x, x[i].y);
        at[4] = make_uint2(x[i].z, x[i].w);
        if ((chunk & (kLanesPerGroup - 1)) == 0) offsets[chunk / kLanesPerGroup] = -kNibbleOffset * sum;
      }
    }
  }
  return squares;
}

template <int kWarps, int kDepth, int kTiles, int kMinBlocks, int kGroupsPerBlock, bool kNorm>
__global__ void __launch_bounds__(kWarps * 32, kMinBlocks) gemv_int4_kernel(const GemvParams p) {
  constexpr int kRows = kTiles * kMmaRows;
  constexpr int kLoads = kStagedLoads<kNorm>;
  extern __shared__ uint4 staged[];  // bf16 (cols padded to 64), normed but for the division by the rms; then offsets
  __shared__ float partial[kWarps][kRows + 1];  // last: sum of squares
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, g = lane >> 2, t = lane & 3;
  const int num_blocks = ceil_div(p.cols, 64), share = ceil_div(num_blocks, kWarps);
  const int first = warp * share, last = min(num_blocks, first + share);  // this warp's blocks of 64
  const int first_tile = blockIdx.x * kTiles;
  float* offsets = reinterpret_cast<float*>(staged + num_blocks * 8);

  const uint4* weights[kTiles];
  const uint32_t* scales[kTiles];
  const int num_groups = kGroupsPerBlock == 1 ? p.cols >> p.group_shift : num_blocks * kGroupsPerBlock;
#pragma unroll
  for (int m = 0; m < kTiles; m++) {
    const int tile = min(first_tile + m, p.num_blocks - 1);
    weights[m] = static_cast<const uint4*>(p.data) + static_cast<std::size_t>(tile) * num_blocks * 32 + lane;
    scales[m] = static_cast<const uint32_t*>(p.scales) + static_cast<std::size_t>(tile) * num_groups * 8 + g;
  }
  uint4 ring[kDepth][kTiles];
  uint32_t scale_ring[kDepth][kTiles][kGroupsPerBlock];  // fp16 of rows g and g + 8
  const auto load = [&](int d, int block) {
#pragma unroll
    for (int m = 0; m < kTiles; m++) {
      ring[d][m] = load_once(weights[m] + block * 32);
#pragma unroll
      for (int i = 0; i < kGroupsPerBlock; i++) {
        const int group = kGroupsPerBlock == 1 ? block >> (p.group_shift - 6) : block * kGroupsPerBlock + i;
        scale_ring[d][m][i] = __ldg(scales[m] + group * 8);
      }
    }
  };
#pragma unroll
  for (int d = 0; d < kDepth; d++) {
    if (first + d < last) load(d, first + d);
  }
  uint4 gain[kNorm ? kLoads : 1];
  if constexpr (kNorm) {
#pragma unroll
    for (int i = 0; i < kLoads; i++) {
      const int chunk = first * 8 + i * 32 + lane;
      gain[i] = chunk < last * 8 && chunk * 8 < p.cols ? load_constant(p.gain + chunk * 8) : make_uint4(0, 0, 0, 0);
    }
  }
  start_dependents();
  wait_for_predecessor();

  // Warp m finishes tile m; its residual is fetched early.
  const int own_tile = min(first_tile + warp, p.num_blocks - 1);
  const int own_row = block_row<kMmaRows>(p, own_tile, lane & (kMmaRows - 1));
  const float old_residual = warp < kTiles ? load_residual(p, 0, own_row) : 0.0f;
  float squares = stage_x<kGroupsPerBlock, kNorm>(p, gain, first, last, lane, reinterpret_cast<uint2*>(staged), offsets);
  __syncwarp();

  float sums[kTiles][2] = {};  // rows g and g + 8
  for (int begin = first; begin < last; begin += kDepth) {
#pragma unroll
    for (int d = 0; d < kDepth; d++) {
      const int block = begin + d;
      if (block >= last) break;
      const uint4 x01 = staged[block * 8 + t * 2], x23 = staged[block * 8 + t * 2 + 1];
      const uint32_t x[8] = {x01.x, x01.y, x01.z, x01.w, x23.x, x23.y, x23.z, x23.w};
#pragma unroll
      for (int i = 0; i < kGroupsPerBlock; i++) {
        const float offset = offsets[block * kGroupsPerBlock + i];
#pragma unroll
        for (int m = 0; m < kTiles; m++) {
          const uint32_t words[4] = {ring[d][m].x, ring[d][m].y, ring[d][m].z, ring[d][m].w};
          constexpr int kSteps = 4 / kGroupsPerBlock;
          float products[2][4] = {{offset, 0.0f, offset, 0.0f}};  // two chains: a product waits for the one before last
#pragma unroll
          for (int j = 0; j < kSteps; j++) {
            const int s = i * kSteps + j;
            uint32_t a[4];
#pragma unroll
            for (int k = 0; k < 4; k++) a[k] = nibbles_plus_128(words[s], k);
            // Every lane group gives the same x: all eight columns of the product are equal.
            mma_bf16(products[j & 1], a, x[2 * s], x[2 * s + 1]);
          }
          const float2 scale = unpack_fp16(scale_ring[d][m][i]);
          sums[m][0] = fmaf(scale.x, products[0][0] + products[1][0], sums[m][0]);
          sums[m][1] = fmaf(scale.y, products[0][2] + products[1][2], sums[m][1]);
        }
      }
      if (block + kDepth < last) load(d, block + kDepth);
    }
  }
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
    y *= rsqrtf(total / static_cast<float>(p.cols) + p.norm_eps);
  }
  finish_rows<kMmaRows>(p, y, lane, 0, first_tile + warp, own_row, old_residual);
}

namespace {

template <int kConfig, int kGroupsPerBlock, bool kNorm>
void launch_config(const GemvArgs& args, cudaStream_t stream, bool pdl) {
  constexpr Int4Config c = kInt4Configs[kConfig];
  constexpr int kMinBlocks = kGroupsPerBlock == 1 || c.min_blocks < 3 ? c.min_blocks : c.min_blocks - 2;
  const std::size_t num_blocks = static_cast<std::size_t>(ceil_div(args.weight.cols, 64));
  launch(gemv_int4_kernel<c.warps, c.depth, c.tiles, kMinBlocks, kGroupsPerBlock, kNorm>,
         dim3(ceil_div(gemv_blocks(args, kMmaRows), c.tiles)), dim3(c.warps * 32),
         num_blocks * (128 + kGroupsPerBlock * sizeof(float)), stream, pdl, gemv_params(args, kMmaRows));
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
