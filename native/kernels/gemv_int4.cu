// One token and int4 weights on tensor cores: x is normed and staged once a warp, then only nibbles are unpacked.
//
// A block has one packed tile of 16 rows; its warps have contiguous shares of the input features. Weights come in the
// order of the fragments of mma.m16n8k16 (quantized.cu), 512 contiguous bytes a warp and load.
#include "gemv_mma.cuh"

namespace edgellm::kernels {

constexpr int kStagedLoads = 4;  // 16-byte loads of x in flight a lane: 1,024 input features a warp

template <int kWarps, int kDepth, int kMinBlocks, int kGroupsPerBlock, bool kNorm>
__global__ void __launch_bounds__(kWarps * 32, kMinBlocks) gemv_int4_kernel(const GemvParams p) {
  extern __shared__ uint4 staged[];                // bf16 (cols padded to 64), normed but for the division by the rms
  __shared__ float partial[kWarps][kMmaRows + 1];  // last: sum of squares
  const int tid = threadIdx.x, lane = tid & 31, warp = tid >> 5, g = lane >> 2, t = lane & 3;
  const int num_blocks = ceil_div(p.cols, 64), share = ceil_div(num_blocks, kWarps);
  const int first = warp * share, last = min(num_blocks, first + share);  // this warp's blocks of 64
  const int tile = blockIdx.x;

  MmaWeights<WeightFormat::int4, kGroupsPerBlock> ring[kDepth];
#pragma unroll
  for (int d = 0; d < kDepth; d++) {
    if (first + d < last) ring[d].load(p, tile, first + d, lane);
  }
  uint4 gain[kNorm ? kStagedLoads : 1];
  if constexpr (kNorm) {
#pragma unroll
    for (int i = 0; i < kStagedLoads; i++) {
      const int chunk = first * 8 + i * 32 + lane;
      gain[i] = chunk < last * 8 && chunk * 8 < p.cols ? load_constant(p.gain + chunk * 8) : make_uint4(0, 0, 0, 0);
    }
  }
  start_dependents();
  wait_for_predecessor();

  const int own_row = block_row<kMmaRows>(p, tile, tid & (kMmaRows - 1));
  const float old_residual = tid < kMmaRows ? load_residual(p, 0, own_row) : 0.0f;
  float squares = 0.0f;
  for (int begin = first * 8; begin < last * 8; begin += 32 * kStagedLoads) {
    uint4 x[kStagedLoads];
#pragma unroll
    for (int i = 0; i < kStagedLoads; i++) {
      const int chunk = begin + i * 32 + lane;
      x[i] = chunk < last * 8 && chunk * 8 < p.cols ? load_activation(p.x + chunk * 8) : make_uint4(0, 0, 0, 0);
    }
#pragma unroll
    for (int i = 0; i < kStagedLoads; i++) {
      const int chunk = begin + i * 32 + lane;
      if (chunk >= last * 8) continue;
      if constexpr (kNorm) {
        const bool is_first = begin == first * 8;
        const uint4 g8 =
            is_first ? gain[i] : (chunk * 8 < p.cols ? load_constant(p.gain + chunk * 8) : make_uint4(0, 0, 0, 0));
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
      staged[chunk] = x[i];
    }
  }
  __syncwarp();

  float low = 0.0f, high = 0.0f;  // rows g and g + 8
  const uint2* columns = reinterpret_cast<const uint2*>(staged) + t;
  for (int begin = first; begin < last; begin += kDepth) {
#pragma unroll
    for (int d = 0; d < kDepth; d++) {
      const int block = begin + d;
      if (block >= last) break;
#pragma unroll
      for (int i = 0; i < kGroupsPerBlock; i++) {
        constexpr int kSteps = 4 / kGroupsPerBlock;
        float sums[2][4] = {};  // two chains: a product waits for the one before last
#pragma unroll
        for (int j = 0; j < kSteps; j++) {
          const int s = i * kSteps + j;
          uint32_t a[4];
          ring[d].fragment(s, a);
          // Every lane group gives the same x: all eight columns of the product are equal.
          const uint2 b = columns[block * 16 + s * 4];
          mma_bf16(sums[j & 1], a, b.x, b.y);
        }
        const float2 scale = unpack_fp16(ring[d].scale[i]);
        low = fmaf(scale.x, sums[0][0] + sums[1][0], low);
        high = fmaf(scale.y, sums[0][2] + sums[1][2], high);
      }
      if (block + kDepth < last) ring[d].load(p, tile, block + kDepth, lane);
    }
  }
  if constexpr (kNorm) squares = warp_sum(squares);
  if (t == 0) {
    partial[warp][g] = low;
    partial[warp][g + 8] = high;
  }
  if (lane == 0) partial[warp][kMmaRows] = squares;
  __syncthreads();
  if (warp != 0) return;
  float y = 0.0f, total = 0.0f;
#pragma unroll
  for (int w = 0; w < kWarps; w++) {
    y += partial[w][lane & (kMmaRows - 1)];
    total += partial[w][kMmaRows];
  }
  if constexpr (kNorm) y *= rsqrtf(total / static_cast<float>(p.cols) + p.norm_eps);
  finish_rows<kMmaRows>(p, y, lane, 0, tile, own_row, old_residual);
}

namespace {

template <int kConfig, int kGroupsPerBlock, bool kNorm>
void launch_config(const GemvArgs& args, cudaStream_t stream, bool pdl) {
  constexpr Int4Config c = kInt4Configs[kConfig];
  const std::size_t shared_bytes = static_cast<std::size_t>(ceil_div(args.weight.cols, 64)) * 128;
  launch(gemv_int4_kernel<c.warps, c.depth, c.min_blocks, kGroupsPerBlock, kNorm>, dim3(gemv_blocks(args, kMmaRows)),
         dim3(c.warps * 32), shared_bytes, stream, pdl, gemv_params(args, kMmaRows));
}

template <int kGroupsPerBlock, bool kNorm>
void launch_groups(const GemvArgs& args, const GemvTile& tile, cudaStream_t stream, bool pdl) {
  switch (tile.config) {
    case 0:
      return launch_config<0, kGroupsPerBlock, kNorm>(args, stream, pdl);
    case 1:
      return launch_config<1, kGroupsPerBlock, kNorm>(args, stream, pdl);
    case 2:
      return launch_config<2, kGroupsPerBlock, kNorm>(args, stream, pdl);
    case 3:
      return launch_config<3, kGroupsPerBlock, kNorm>(args, stream, pdl);
    default:
      return launch_config<4, kGroupsPerBlock, kNorm>(args, stream, pdl);
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
