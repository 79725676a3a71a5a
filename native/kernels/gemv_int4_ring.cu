// The int4 product of several tokens, at most eight a launch, groups of 64 and more: each has the bits that
// gemv_int4.cuh gives it alone.
//
// The tokens' digits are columns of two products with the same weights, four tokens each. Weights and scales go to
// shared memory by cp.async, each lane's to places that only it reads: kDepth blocks of a warp are under way. Of x a
// warp stages four blocks at a time, one eight of each token a lane.
#include <algorithm>

#include "copy_async.cuh"
#include "gemv_int4.cuh"

namespace edgellm::kernels {
namespace {

constexpr int kMaxTokens = 8;
constexpr int kWindow = 4;                                           // blocks of 64 input features
constexpr int kTokenWords = kWindow * kInt4StagedWords;              // 32-bit words of a token's window
constexpr int kSlotBytes = 32 * (sizeof(uint4) + sizeof(uint32_t));  // a tile's block: weights, then scales

template <int kWarps, int kDepth, int kTiles, bool kNorm>
__global__ void __launch_bounds__(kWarps * 32, 16 / kWarps) gemv_int4_ring_kernel(const GemvParams p) {
  constexpr int kRows = kTiles * kMmaRows;
  constexpr int kJobs = ceil_div(kTiles * kMaxTokens, kWarps);  // tiles of one token that a warp finishes
  static_assert(kWarps % kTiles == 0 && kWindow % kDepth == 0);
  // The warps' rings of kDepth * kTiles slots, then (warps, tokens, kTokenWords) of x.
  extern __shared__ uint4 shared[];
  __shared__ float partial[kWarps][kMaxTokens][kRows + 1];  // last: sum of squares
  const int lane = threadIdx.x & 31, warp = warp_index(), g = lane >> 2, t = lane & 3;
  const int num_blocks = ceil_div(p.cols, 64), share = ceil_div(num_blocks, kWarps);
  const int first = warp * share, last = min(num_blocks, first + share);  // this warp's blocks of 64
  const int last_chunk = min(last * 8, p.cols / 8);
  const int first_tile = blockIdx.x * kTiles, num_groups = p.cols >> p.group_shift;

  const uint4* weights[kTiles];
  const uint32_t* scales[kTiles];
#pragma unroll
  for (int m = 0; m < kTiles; m++) {
    const int tile = min(first_tile + m, p.num_blocks - 1);
    weights[m] = static_cast<const uint4*>(p.data) + static_cast<std::size_t>(tile) * num_blocks * 32 + lane;
    scales[m] = static_cast<const uint32_t*>(p.scales) + static_cast<std::size_t>(tile) * num_groups * 8 + g;
  }
  const uint32_t ring = shared_address(shared) + warp * (kDepth * kTiles * kSlotBytes);
  const auto copy = [&](int slot, int block) {
    const bool inside = block < last;
#pragma unroll
    for (int m = 0; m < kTiles; m++) {
      const uint32_t to = ring + (slot * kTiles + m) * kSlotBytes;
      copy_weights16(to + lane * 16, weights[m] + block * 32, inside);
      copy_scales4(to + 512 + lane * 4, scales[m] + (block >> (p.group_shift - 6)) * 8, inside);
    }
    commit_copies();
  };
#pragma unroll
  for (int d = 0; d < kDepth; d++) copy(d, first + d);
  uint4 gain = make_uint4(0, 0, 0, 0);
  const auto load_gain = [&](int begin) {
    const int chunk = begin * 8 + lane;
    gain = chunk < last_chunk ? load_constant(p.gain + chunk * 8) : make_uint4(0, 0, 0, 0);
  };
  if constexpr (kNorm) load_gain(first);
  const int own_tile = first_tile + warp % kTiles, first_token = warp / kTiles;
  const int own_row = block_row<kMmaRows>(p, min(own_tile, p.num_blocks - 1), lane & (kMmaRows - 1));
  const int num_tokens = p.num_tokens;
  RowConstants<WeightFormat::int4> constants;
  if (first_token < num_tokens) constants.load(p, own_row);
  start_dependents();
  wait_for_predecessor();

  uint4 x[kMaxTokens];
  const auto load_x = [&](int begin) {
    const int chunk = begin * 8 + lane;
#pragma unroll
    for (int token = 0; token < kMaxTokens; token++) {
      if (token >= num_tokens) break;
      x[token] = make_uint4(0, 0, 0, 0);
      if (chunk < last_chunk) x[token] = load_activation(p.x + static_cast<std::size_t>(token) * p.cols + chunk * 8);
    }
  };
  load_x(first);
  float old_residual[kJobs];
#pragma unroll
  for (int i = 0; i < kJobs; i++) {
    const int token = first_token + i * (kWarps / kTiles);
    old_residual[i] = token < num_tokens ? load_residual(p, token, own_row) : 0.0f;
  }
  uint32_t* staged = reinterpret_cast<uint32_t*>(shared) + kWarps * kDepth * kTiles * (kSlotBytes / 4) +
                     warp * num_tokens * kTokenWords;
  uint32_t signs;
  asm("mov.b32 %0,0x80808080;" : "=r"(signs));
  // Columns 2 j and 2 j + 1 of a product are token j's low and high digits; those without a token repeat the last one.
  const uint4* columns[2];
  const float* inverses[2];
#pragma unroll
  for (int half = 0; half < 2; half++) {
    const int of_column = min(half * 4 + (g >> 1), num_tokens - 1), own = min(half * 4 + t, num_tokens - 1);
    columns[half] = reinterpret_cast<const uint4*>(staged + of_column * kTokenWords) + (g & 1) * 4 + t;
    inverses[half] = reinterpret_cast<const float*>(staged + own * kTokenWords) + 32;
  }
  float squares[kMaxTokens] = {};
  float sums[kTiles][2][2] = {};  // of tokens t and 4 + t, rows g and g + 8
  for (int begin = first; begin < last; begin += kWindow) {
#pragma unroll
    for (int token = 0; token < kMaxTokens; token++) {
      if (token >= num_tokens) break;
      stage_eight<kNorm>(x[token], gain, lane & 7, begin + (lane >> 3) < last,
                         staged + token * kTokenWords + (lane >> 3) * kInt4StagedWords, squares[token]);
    }
    __syncwarp();
    if (begin + kWindow < last) {
      if constexpr (kNorm) load_gain(begin + kWindow);
      load_x(begin + kWindow);
    }
#pragma unroll
    for (int d = 0; d < kWindow; d++) {
      const int block = begin + d, slot = d % kDepth;
      if (block >= last) break;
      wait_for_copies<kDepth - 1>();
      uint32_t a[kTiles][4][2], scale[kTiles];
#pragma unroll
      for (int m = 0; m < kTiles; m++) {
        const uint32_t from = ring + (slot * kTiles + m) * kSlotBytes;
        unpack_tile(load_shared16(from + lane * 16), signs, a[m]);
        scale[m] = load_shared4(from + 512 + lane * 4);
      }
#pragma unroll
      for (int half = 0; half < 2; half++) {
        if (half == 1 && num_tokens <= 4) break;
        const uint4 digits = columns[half][d * (kInt4StagedWords / 4)];
        const uint32_t xs[4] = {digits.x, digits.y, digits.z, digits.w};
        const float inverse = inverses[half][d * kInt4StagedWords];
#pragma unroll
        for (int m = 0; m < kTiles; m++) add_int4_products<1>(a[m], xs, inverse, &scale[m], sums[m][half]);
      }
      copy(slot, block + kDepth);
    }
    __syncwarp();
  }
#pragma unroll
  for (int token = 0; token < kMaxTokens; token++) {
    if (token >= num_tokens) break;
    if constexpr (kNorm) squares[token] = warp_sum(squares[token]);
    if (t == (token & 3)) {
#pragma unroll
      for (int m = 0; m < kTiles; m++) {
        partial[warp][token][m * kMmaRows + g] = sums[m][token >> 2][0];
        partial[warp][token][m * kMmaRows + g + 8] = sums[m][token >> 2][1];
      }
    }
    if (kNorm && lane == 0) partial[warp][token][kRows] = squares[token];
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

struct Ring {
  int warps;
  int depth;
  int tiles;  // of 16 rows a block
};
// For each number of warps that a single token's kernel may have: for few rows and for many.
constexpr Ring kRings[][2] = {{{4, 4, 2}, {4, 4, 4}}, {{8, 4, 2}, {8, 2, 4}}, {{16, 2, 2}, {16, 2, 2}}};

constexpr std::size_t ring_bytes(const Ring& ring, int tokens) {
  return static_cast<std::size_t>(ring.warps) * (ring.depth * ring.tiles * kSlotBytes + tokens * kTokenWords * 4);
}

template <int kRow, int kColumn, bool kNorm>
void launch_ring(const GemvArgs& args, cudaStream_t stream, bool pdl) {
  constexpr Ring c = kRings[kRow][kColumn];
  const auto kernel = gemv_int4_ring_kernel<c.warps, c.depth, c.tiles, kNorm>;
  // What most tokens need: of another thread's launch with more tokens, too.
  EDGELLM_CUDA_TRY(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                        static_cast<int>(ring_bytes(c, kMaxTokens))));
  launch(kernel, dim3(ceil_div(gemv_blocks(args, kMmaRows), c.tiles)), dim3(c.warps * 32),
         ring_bytes(c, args.num_tokens), stream, pdl, gemv_params(args, kMmaRows));
}

template <int kRow, int kColumn>
void launch_ring(const GemvArgs& args, cudaStream_t stream, bool pdl) {
  if (args.gain) return launch_ring<kRow, kColumn, true>(args, stream, pdl);
  launch_ring<kRow, kColumn, false>(args, stream, pdl);
}

template <int kRow>
void launch_ring(const GemvArgs& args, cudaStream_t stream, bool pdl) {
  const int most_tiles = kRings[kRow][1].tiles;
  const bool many = ceil_div(gemv_blocks(args, kMmaRows), most_tiles) >= device_traits().num_sms;
  if (many) return launch_ring<kRow, 1>(args, stream, pdl);
  launch_ring<kRow, 0>(args, stream, pdl);
}

}  // namespace

std::size_t int4_ring_bytes(int warps, int tokens) {
  std::size_t most = 0;
  for (const Ring& ring : kRings[warps / 8]) {
    const std::size_t sums = sizeof(float) * ring.warps * kMaxTokens * (ring.tiles * kMmaRows + 1);
    most = std::max(most, sums + ring_bytes(ring, std::min(tokens, kMaxTokens)));
  }
  return most;
}

bool int4_ring_fits(int warps, const GemvDevice& device) {
  return int4_ring_bytes(warps, kMaxTokens) <= device.max_shared_bytes;
}

void launch_int4_ring(const GemvArgs& args, int warps, cudaStream_t stream, bool pdl) {
  for (int first = 0; first < args.num_tokens; first += kMaxTokens) {
    const GemvArgs part = gemv_part(args, first, kMaxTokens, kMmaRows);
    const bool part_pdl = pdl || first > 0;
    if (warps == 4) {
      launch_ring<0>(part, stream, part_pdl);
    } else if (warps == 8) {
      launch_ring<1>(part, stream, part_pdl);
    } else {
      launch_ring<2>(part, stream, part_pdl);
    }
  }
}

}  // namespace edgellm::kernels
