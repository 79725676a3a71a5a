// Products of many tokens with int4 weights: y (tokens, rows) = x (tokens, cols) W^T on mma.m16n8k16, with the weights
// in the order of quantized.cu, which is that of the products' fragments.
//
// A block has a tile of rows and tokens; four of its eight warps share the rows, twice. Weights, their scales and x
// come by cp.async, 64 input features a stage. A weight becomes bf16 exactly, products of a group, or of its half if it
// has 128, are summed and then scaled: nothing is rounded but the result. Every tile adds in the same order, so a token
// has the same bits in all of them.
#include <cassert>
#include <iterator>
#include <limits>

#include "edgellm/kernels/gemm_int4.hpp"
#include "gemm_int4.cuh"

namespace edgellm::kernels {

namespace {

constexpr int kThreads = 256;
constexpr int kRowWarps = 4;            // side by side over a block's rows
constexpr int kTokenWarps = 2;          // and over its tokens
constexpr int kStageBytes = 76 * 1024;  // of all stages, but for the largest tile: two blocks have room on Orin

template <int kRowTiles, int kTokenTiles, int kGroups>
struct Shape {
  static constexpr int groups = kGroups;
  static constexpr int tiles = kRowWarps * kRowTiles;
  static constexpr int rows = tiles * kTileRows;
  static constexpr int tokens = kTokenWarps * kTokenTiles * 8;
  static constexpr int weights_at = tokens * kRowBytes;
  static constexpr int scales_at = weights_at + tiles * kTileBytes;
  static constexpr int stage_bytes = scales_at + tiles * kGroups * 32;
  // Two stages are multiplied between two barriers. Small tiles are multiplied faster than memory answers: more of them
  // are on their way.
  static constexpr int stages = kStageBytes / stage_bytes < 6 ? 4 : kStageBytes / stage_bytes / 2 * 2;
  static constexpr int y_stride = rows + 8;  // elements: tokens two apart lie in other banks
  static constexpr int shared_bytes = stages * stage_bytes;
  static_assert(tokens * y_stride * 2 <= shared_bytes);
};

// One thread's copies to shared memory, one block of input features after the other; zeros after the last.
template <class S>
struct Copies {
  static constexpr int kTokenStep = kThreads / 8;  // a thread's tokens are so far apart

  const uint8_t* weights_from;  // of the next block
  const uint8_t* scales_from;   // of group 0
  const bf16* x_from;           // of the next block and the thread's first token
  int weight_blocks;            // num_blocks, or 0 without weights
  int x_left;                   // columns from the thread's own on
  int num_tokens;               // from the thread's first one on
  int cols;
  int group_shift;
  int num_blocks;
  bool has_scales;
  uint32_t weights_to;  // of stage 0
  uint32_t scales_to;
  uint32_t x_to;

  __device__ __forceinline__ Copies(const GemmInt4Params& p, uint32_t shared, int first_tile, int first_token)
      : cols(p.cols), group_shift(p.group_shift) {
    const int i = static_cast<int>(threadIdx.x);
    num_blocks = ceil_div(p.cols, kBlock);
    const int weight_tile = first_tile + i / 32;
    const bool has_weights = weight_tile < p.num_tiles;
    weights_from =
        p.data + static_cast<std::size_t>(has_weights ? weight_tile : 0) * num_blocks * kTileBytes + i % 32 * 16;
    weight_blocks = has_weights ? num_blocks : 0;
    weights_to = shared + S::weights_at + i * 16;
    const int scale_tile = first_tile + i / (S::groups * 2);
    has_scales = scale_tile < p.num_tiles;
    scales_from =
        p.scales + static_cast<std::size_t>(has_scales ? scale_tile : 0) * p.num_groups * 32 + i % (S::groups * 2) * 16;
    scales_to = shared + S::scales_at + i * 16;
    const int token = i / 8, piece = i % 8;
    num_tokens = p.num_tokens - first_token - token;
    x_left = p.cols - piece * 8;
    x_from = p.x + static_cast<std::size_t>(first_token + token) * p.cols + piece * 8;
    x_to = shared + token * kRowBytes + x_place(piece, token) * 16;
  }

  __device__ __forceinline__ void weights(int stage, int block) {
    const uint32_t at = stage * S::stage_bytes;
    if (S::tiles * 32 == kThreads || static_cast<int>(threadIdx.x) < S::tiles * 32) {
      copy_weights16(weights_to + at, weights_from, block < weight_blocks);
    }
    weights_from += kTileBytes;
    if (static_cast<int>(threadIdx.x) < S::tiles * S::groups * 2) {
      const bool inside = has_scales && block < num_blocks;
      const int group = S::groups == 1 ? block >> group_shift : block * S::groups;
      copy_weights16(scales_to + at, scales_from + (inside ? group : 0) * 32, inside);
    }
  }

  __device__ __forceinline__ void x(int stage) {
    const uint32_t at = stage * S::stage_bytes;
    const bf16* from = x_from;
#pragma unroll
    for (int j = 0; j < S::tokens / kTokenStep; j++) {
      copy_async16(x_to + at + j * kTokenStep * kRowBytes, from, x_left > 0 && j * kTokenStep < num_tokens);
      from += kTokenStep * cols;
    }
    x_from += kBlock;
    x_left -= kBlock;
  }
};

template <int kRowTiles, int kTokenTiles, int kGroups>
__global__ void __launch_bounds__(kThreads, kRowTiles* kTokenTiles > 8 ? 1 : 2)
    gemm_int4_kernel(const GemmInt4Params p) {
  using S = Shape<kRowTiles, kTokenTiles, kGroups>;
  static_assert(S::tiles * kGroups * 2 <= kThreads);
  extern __shared__ uint4 memory[];
  const int lane = threadIdx.x & 31, warp = warp_index(), g = lane >> 2, t = lane & 3;
  const int row_warp = warp % kRowWarps, token_warp = warp / kRowWarps;
  const int num_blocks = ceil_div(p.cols, kBlock);
  const uint32_t shared = shared_address(memory);
  const int first_tile = static_cast<int>(blockIdx.y) * S::tiles,
            first_token = static_cast<int>(blockIdx.x) * S::tokens;
  Copies<S> copies(p, shared, first_tile, first_token);
  start_dependents();
  constexpr int kAhead = S::stages - 2;
#pragma unroll
  for (int stage = 0; stage < kAhead; stage++) copies.weights(stage, stage);
  wait_for_predecessor();
#pragma unroll
  for (int stage = 0; stage < kAhead; stage++) {
    copies.x(stage);
    if (stage % 2 == 1) commit_copies();
  }

  float sums[kRowTiles][kTokenTiles][4] = {};  // rows g, g, g + 8, g + 8 of tokens 2 t, 2 t + 1, 2 t, 2 t + 1
  const uint32_t own_x = shared + (token_warp * kTokenTiles * 8 + g) * kRowBytes + (t & 1) * 8;
  const uint32_t own_weights = shared + S::weights_at + row_warp * kRowTiles * kTileBytes + lane * 16;
  const uint32_t own_scales = shared + S::scales_at + row_warp * kRowTiles * kGroups * 32 + g * 4;
  const auto multiply = [&](int stage) {
    const uint32_t at = stage * S::stage_bytes;
    uint4 words[kRowTiles];
#pragma unroll
    for (int m = 0; m < kRowTiles; m++) words[m] = load_shared16(own_weights + at + m * kTileBytes);
#pragma unroll
    for (int i = 0; i < kGroups; i++) {
      constexpr int kSteps = 4 / kGroups;  // products of 16 input features in a group, or in its part of a block
      float group_sums[kRowTiles][kTokenTiles][4];
#pragma unroll
      for (int step = 0; step < kSteps; step++) {
        const int s = i * kSteps + step;
        uint2 b[kTokenTiles];
#pragma unroll
        for (int n = 0; n < kTokenTiles; n++) {
          b[n] = load_shared8(own_x + at + n * 8 * kRowBytes + x_place(2 * s + (t >> 1), g) * 16);
        }
#pragma unroll
        for (int m = 0; m < kRowTiles; m++) {
          const uint32_t word = s == 0 ? words[m].x : s == 1 ? words[m].y : s == 2 ? words[m].z : words[m].w;
          uint32_t a[4];
#pragma unroll
          for (int j = 0; j < 4; j++) a[j] = int4x2_to_bf16x2(word, j);
#pragma unroll
          for (int n = 0; n < kTokenTiles; n++) {
            if (step == 0) {
              first_mma_bf16(group_sums[m][n], a, b[n].x, b[n].y);
            } else {
              mma_bf16(group_sums[m][n], a, b[n].x, b[n].y);
            }
          }
        }
      }
#pragma unroll
      for (int m = 0; m < kRowTiles; m++) {
        const float2 scale = unpack_fp16(load_shared4(own_scales + at + (m * kGroups + i) * 32));
#pragma unroll
        for (int n = 0; n < kTokenTiles; n++) add_scaled(sums[m][n], scale, group_sums[m][n]);
      }
    }
  };
  int stage = 0, next_stage = kAhead;
  for (int block = 0; block < num_blocks; block += 2) {
    wait_for_copies<kAhead / 2 - 1>();
    __syncthreads();  // all copies of these stages have come, and the last ones' have been read
#pragma unroll
    for (int i = 0; i < 2; i++) {
      copies.weights(next_stage + i, block + kAhead + i);
      copies.x(next_stage + i);
    }
    commit_copies();
    multiply(stage);
    multiply(stage + 1);
    stage = stage + 2 == S::stages ? 0 : stage + 2;
    next_stage = next_stage + 2 == S::stages ? 0 : next_stage + 2;
  }
  wait_for_copies<0>();
  __syncthreads();

  // Through shared memory, so that y is written 16 bytes at a time.
  bf16* const tile = reinterpret_cast<bf16*>(memory);
#pragma unroll
  for (int m = 0; m < kRowTiles; m++) {
#pragma unroll
    for (int n = 0; n < kTokenTiles; n++) {
#pragma unroll
      for (int i = 0; i < 4; i++) {
        const int row = (row_warp * kRowTiles + m) * kTileRows + g + 8 * (i >> 1);
        const int token = (token_warp * kTokenTiles + n) * 8 + 2 * t + (i & 1);
        tile[token * S::y_stride + row] = __float2bfloat16(sums[m][n][i]);
      }
    }
  }
  __syncthreads();
  for (int i = threadIdx.x; i < S::tokens * S::tiles * 2; i += kThreads) {
    const int token = i / (S::tiles * 2), eight = i % (S::tiles * 2);
    const int packed = first_tile + eight / 2;
    if (first_token + token >= p.num_tokens) break;
    store_eight(p, packed, eight % 2, first_token + token,
                *reinterpret_cast<const uint4*>(tile + token * S::y_stride + eight * 8));
  }
}

template <int kTile, int kGroups>
struct Tile {
  static constexpr int row_tiles = kGemmInt4Tiles[kTile].rows / (kRowWarps * kTileRows);
  static constexpr int token_tiles = kGemmInt4Tiles[kTile].tokens / (kTokenWarps * 8);
  using S = Shape<row_tiles, token_tiles, kGroups>;
  static constexpr auto kernel = gemm_int4_kernel<row_tiles, token_tiles, kGroups>;

  static void load() {
    EDGELLM_CUDA_TRY(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, S::shared_bytes));
  }
  static void launch_async(const GemmInt4Params& p, cudaStream_t stream, bool pdl) {
    load();
    launch(kernel, dim3(ceil_div(p.num_tokens, S::tokens), ceil_div(p.num_tiles, S::tiles)), dim3(kThreads),
           S::shared_bytes, stream, pdl, p);
  }
};

// use(Tile<tile, kGroups>) for one tile, or for all where it is negative.
template <int kGroups, int kTile = 0, class Use>
void with_tile(int tile, const Use& use) {
  if (tile < 0 || tile == kTile) use(Tile<kTile, kGroups>());
  if constexpr (!kGemmInt4Tiles[kTile + 1].split) with_tile<kGroups, kTile + 1>(tile, use);
}
template <class Use>
void with_tile_of_group(int group, int tile, const Use& use) {
  switch (group) {
    case 16:
      return with_tile<4>(tile, use);
    case 32:
      return with_tile<2>(tile, use);
    default:
      return with_tile<1>(tile, use);
  }
}

GemmInt4Params params_of(const GemmInt4Args& args) {
  const WeightView& w = args.weight;
  GemmInt4Params p;
  p.data = static_cast<const uint8_t*>(w.data);
  p.scales = static_cast<const uint8_t*>(w.scales);
  p.x = args.x;
  p.y = args.y;
  p.y_f32 = args.y_f32;
  p.rows = w.rows;
  p.cols = w.cols;
  p.num_tokens = args.num_tokens;
  p.num_tiles = args.gate_up ? ceil_div(w.rows / 2, kTileRows / 2) : ceil_div(w.rows, kTileRows);
  p.num_groups = w.group >= kBlock ? w.cols / w.group : ceil_div(w.cols, kBlock) * (kBlock / w.group);
  p.group_shift = w.group == 128 ? 1 : 0;
  p.gate_up = args.gate_up;
  p.whole = w.rows % (args.gate_up ? 16 : 8) == 0;
  return p;
}

}  // namespace

// By what 64 input features take on an H200, in units of 10 ns, where a block is alone on its multiprocessor and where
// it is not.
int choose_gemm_int4_tile(int num_tokens, int rows, int num_sms, bool two_fit) {
  struct Cost {
    int one, two;
  };
  constexpr Cost kCosts[] = {{87, 174}, {55, 94}, {37, 56}, {29, 40}};
  static_assert(kGemmInt4Tiles[std::size(kCosts)].split && !kGemmInt4Tiles[std::size(kCosts) - 1].split);
  int best = 0;
  long least = std::numeric_limits<long>::max();
  for (int tile = 0; tile < static_cast<int>(std::size(kCosts)); tile++) {
    const GemmInt4Tile shape = kGemmInt4Tiles[tile];
    const long rounds = ceil_div(ceil_div(num_tokens, shape.tokens) * ceil_div(rows, shape.rows), num_sms);
    const long pairs = two_fit ? rounds / 2 : 0;
    const long cost = pairs * kCosts[tile].two + (rounds - 2 * pairs) * kCosts[tile].one;
    if (cost < least) best = tile, least = cost;
  }
  return best;
}

void gemm_int4_async(const GemmInt4Args& args, cudaStream_t stream, bool pdl) {
  const WeightView& w = args.weight;
  assert(w.format == WeightFormat::int4 && w.cols % 16 == 0 && args.tile < kNumGemmInt4Tiles);
  const DeviceTraits& device = device_traits();
  int tile = args.tile;
  if (args.y == nullptr) {
    tile = find_gemm_int4_split(args.num_tokens, w.group, device.max_shared_bytes);
    assert(tile >= 0);
  } else if (tile < 0 && !args.row_invariant) {
    tile = choose_gemm_int4_split(args.num_tokens, w.rows, w.group, device.num_sms, device.max_shared_bytes);
  }
  if (tile < 0) {
    const bool two_fit = device.shared_bytes_of_sm >= 2 * (kStageBytes + 1024);
    tile = choose_gemm_int4_tile(args.num_tokens, w.rows, device.num_sms, two_fit);
  }
  const GemmInt4Params p = params_of(args);
  if (kGemmInt4Tiles[tile].split) return launch_gemm_int4_split(p, tile, w.group, stream, pdl);
  with_tile_of_group(w.group, tile, [&](auto chosen) { chosen.launch_async(p, stream, pdl); });
}

void load_gemm_int4(int group) {
  with_tile_of_group(group, -1, [](auto each) { each.load(); });
  load_gemm_int4_split(group);
}

}  // namespace edgellm::kernels
