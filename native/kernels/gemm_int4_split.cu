// Products of up to 64 tokens with int4 weights: y (tokens, rows) = x (tokens, cols) W^T on mma.m16n8k16.
//
// Few tokens are few products for each weight, and what counts is that weights keep coming. A block has 32 or 64 rows
// and all tokens; its warps divide the input features, so that none waits for another until they add up their sums.
// Weights go from memory to registers, in the order of quantized.cu, which is that of the products' fragments; x comes
// by cp.async to places that only its warp reads. Products of a group, or of its half if it has 128, are summed and
// then scaled, as in gemm_int4.cu, but sums have another order.
#include <algorithm>
#include <cassert>

#include "gemm_int4.cuh"

namespace edgellm::kernels {

namespace {

constexpr int kWarps = 8;
constexpr int kThreads = kWarps * 32;

template <int kRowTiles, int kTokenTiles>
struct Shape {
  static constexpr int tokens = kTokenTiles * 8;
  static constexpr int rows = kRowTiles * kTileRows;
  static constexpr int depth = kTokenTiles == 2 ? 4 : kTokenTiles == 4 ? 1 : 2;  // blocks of weights on their way
  static constexpr int stages = kTokenTiles == 2 ? 3 : 2;                        // of x
  static constexpr int stage_bytes = tokens * kRowBytes;
  static constexpr int sum_stride = rows + 4;  // floats: the tokens that a warp stores at once lie in different banks
  static constexpr int shared_bytes = std::max(kWarps * stages * stage_bytes, kWarps * tokens * sum_stride * 4);
  static constexpr int min_blocks = kTokenTiles == 2 ? 2 : 1;
};

template <int kRowTiles, int kTokenTiles, int kGroups>
__global__ void __launch_bounds__(kThreads, (Shape<kRowTiles, kTokenTiles>::min_blocks))
    gemm_int4_split_kernel(const GemmInt4Params p) {
  using S = Shape<kRowTiles, kTokenTiles>;
  constexpr int kSteps = 4 / kGroups;  // products of 16 input features in a group, or in its part of a block
  extern __shared__ uint4 memory[];
  const int lane = threadIdx.x & 31, warp = warp_index(), g = lane >> 2, t = lane & 3;
  const int num_blocks = ceil_div(p.cols, kBlock), share = ceil_div(num_blocks, kWarps);
  const int first = warp * share, last = min(num_blocks, first + share);  // this warp's blocks of input features
  const int first_tile = static_cast<int>(blockIdx.x) * kRowTiles;

  const uint4* weights[kRowTiles];
  const uint32_t* scales[kRowTiles];
#pragma unroll
  for (int m = 0; m < kRowTiles; m++) {
    const std::size_t tile = min(first_tile + m, p.num_tiles - 1);
    weights[m] = reinterpret_cast<const uint4*>(p.data) + tile * num_blocks * 32 + lane;
    scales[m] = reinterpret_cast<const uint32_t*>(p.scales) + tile * p.num_groups * 8 + g;
  }
  uint4 ring[S::depth][kRowTiles];
  uint32_t scale_ring[S::depth][kRowTiles][kGroups];  // fp16 of rows g and g + 8
  const auto load = [&](int d, int m, int block) {
    ring[d][m] = load_once(weights[m] + block * 32);
#pragma unroll
    for (int i = 0; i < kGroups; i++) {
      const int group = kGroups == 1 ? block >> p.group_shift : block * kGroups + i;
      scale_ring[d][m][i] = __ldg(scales[m] + group * 8);
    }
  };
#pragma unroll
  for (int d = 0; d < S::depth; d++) {
#pragma unroll
    for (int m = 0; m < kRowTiles; m++) {
      if (first + d < last) load(d, m, first + d);
    }
  }
  start_dependents();
  wait_for_predecessor();

  // A lane copies piece lane % 8 of every fourth token.
  const uint32_t own = shared_address(memory) + warp * S::stages * S::stage_bytes;
  const int own_token = lane >> 3, own_column = (lane & 7) * 8;
  const uint32_t copy_to = own + own_token * kRowBytes + x_place(lane & 7, own_token) * 16;
  const bf16* copy_from = p.x + static_cast<std::size_t>(own_token) * p.cols + own_column;
  const auto copy = [&](int block) {
    const uint32_t to = copy_to + (block - first) % S::stages * S::stage_bytes;
    const bool inside = block < last && block * kBlock + own_column < p.cols;
    const bf16* from = copy_from + block * kBlock;
#pragma unroll
    for (int j = 0; j < S::tokens / 4; j++) {
      const bool has_token = inside && own_token + j * 4 < p.num_tokens;
      copy_async16(to + j * 4 * kRowBytes, has_token ? from : p.x, has_token);
      from += 4 * p.cols;
    }
    commit_copies();
  };
#pragma unroll
  for (int stage = 0; stage < S::stages - 1; stage++) copy(first + stage);

  float sums[kRowTiles][kTokenTiles][4] = {};  // rows g, g, g + 8, g + 8 of tokens 2 t, 2 t + 1, 2 t, 2 t + 1
  for (int begin = first; begin < last; begin += S::depth) {
#pragma unroll
    for (int d = 0; d < S::depth; d++) {
      const int block = begin + d;
      if (block >= last) break;
      wait_for_copies<S::stages - 2>();
      __syncwarp();  // the others' copies have come, too, and they have read the stage that is copied to next
      copy(block + S::stages - 1);
      const uint32_t x = own + (block - first) % S::stages * S::stage_bytes + g * kRowBytes + (t & 1) * 8;
#pragma unroll
      for (int m = 0; m < kRowTiles; m++) {
        const uint32_t words[4] = {ring[d][m].x, ring[d][m].y, ring[d][m].z, ring[d][m].w};
        uint32_t a[4][4];
#pragma unroll
        for (int s = 0; s < 4; s++) {
#pragma unroll
          for (int j = 0; j < 4; j++) a[s][j] = int4x2_to_bf16x2(words[s], j);
        }
        float2 scale[kGroups];
#pragma unroll
        for (int i = 0; i < kGroups; i++) scale[i] = unpack_fp16(scale_ring[d][m][i]);
        if (block + S::depth < last) load(d, m, block + S::depth);
#pragma unroll
        for (int n = 0; n < kTokenTiles; n++) {
#pragma unroll
          for (int i = 0; i < kGroups; i++) {
            float products[4];
#pragma unroll
            for (int step = 0; step < kSteps; step++) {
              const int s = i * kSteps + step;
              const uint2 b = load_shared8(x + n * 8 * kRowBytes + x_place(2 * s + (t >> 1), g) * 16);
              if (step == 0) {
                first_mma_bf16(products, a[s], b.x, b.y);
              } else {
                mma_bf16(products, a[s], b.x, b.y);
              }
            }
            add_scaled(sums[m][n], scale[i], products);
          }
        }
      }
    }
  }
  wait_for_copies<0>();
  __syncthreads();

  float* const partial = reinterpret_cast<float*>(memory);  // (warps, tokens, sum_stride)
#pragma unroll
  for (int m = 0; m < kRowTiles; m++) {
#pragma unroll
    for (int n = 0; n < kTokenTiles; n++) {
#pragma unroll
      for (int i = 0; i < 4; i++) {
        const int token = n * 8 + 2 * t + (i & 1), row = m * kTileRows + g + 8 * (i >> 1);
        partial[(warp * S::tokens + token) * S::sum_stride + row] = sums[m][n][i];
      }
    }
  }
  __syncthreads();
  for (int i = threadIdx.x; i < p.num_tokens * kRowTiles * 2; i += kThreads) {
    const int token = i / (kRowTiles * 2), eight = i % (kRowTiles * 2), packed = first_tile + eight / 2;
    if (packed >= p.num_tiles) continue;
    float y[8] = {};
#pragma unroll
    for (int w = 0; w < kWarps; w++) {
      const float4* from =
          reinterpret_cast<const float4*>(partial + (w * S::tokens + token) * S::sum_stride + eight * 8);
      const float4 low = from[0], high = from[1];
      y[0] += low.x, y[1] += low.y, y[2] += low.z, y[3] += low.w;
      y[4] += high.x, y[5] += high.y, y[6] += high.z, y[7] += high.w;
    }
    if (p.y != nullptr) {
      const uint32_t words[4] = {pack_bf16(y[0], y[1]), pack_bf16(y[2], y[3]), pack_bf16(y[4], y[5]),
                                 pack_bf16(y[6], y[7])};
      store_eight(p, packed, eight % 2, token, make_uint4(words[0], words[1], words[2], words[3]));
      continue;
    }
    const int row = packed * kTileRows + eight % 2 * 8;
    float* to = p.y_f32 + static_cast<std::size_t>(token) * p.rows + row;
#pragma unroll
    for (int j = 0; j < 8; j++) {
      if (row + j < p.rows) to[j] = y[j];
    }
  }
}

template <int kTile, int kGroups>
struct SplitTile {
  static constexpr int row_tiles = kGemmInt4Tiles[kTile].rows / kTileRows;
  static constexpr int token_tiles = kGemmInt4Tiles[kTile].tokens / 8;
  using S = Shape<row_tiles, token_tiles>;
  static constexpr auto kernel = gemm_int4_split_kernel<row_tiles, token_tiles, kGroups>;

  static void load() {
    if (S::shared_bytes > device_traits().max_shared_bytes) return;  // never launched here
    EDGELLM_CUDA_TRY(
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(S::shared_bytes)));
  }
  static void launch_async(const GemmInt4Params& p, cudaStream_t stream, bool pdl) {
    assert(p.num_tokens <= S::tokens);
    load();
    launch(kernel, dim3(ceil_div(p.num_tiles, row_tiles)), dim3(kThreads), S::shared_bytes, stream, pdl, p);
  }
};

// use(SplitTile<tile, kGroups>) for one tile, or for all where it is negative.
template <int kGroups, int kTile = 0, class Use>
void with_split(int tile, const Use& use) {
  if constexpr (kGemmInt4Tiles[kTile].split) {
    if (tile < 0 || tile == kTile) use(SplitTile<kTile, kGroups>());
  }
  if constexpr (kTile + 1 < kNumGemmInt4Tiles) with_split<kGroups, kTile + 1>(tile, use);
}
template <class Use>
void with_split_of_group(int group, int tile, const Use& use) {
  if (group == 32) return with_split<2>(tile, use);
  if (group > 32) with_split<1>(tile, use);
}

}  // namespace

int find_gemm_int4_split(int num_tokens, int group, std::size_t max_shared_bytes) {
  int best = -1;
  for (int tile = 0; tile < kNumGemmInt4Tiles; tile++) {
    const GemmInt4Tile shape = kGemmInt4Tiles[tile];
    if (!shape.split || shape.tokens < num_tokens) continue;
    bool fits = false;  // nor does it where the group has none
    with_split_of_group(group, tile, [&](auto each) { fits = decltype(each)::S::shared_bytes <= max_shared_bytes; });
    if (fits && (best < 0 || shape.tokens < kGemmInt4Tiles[best].tokens)) best = tile;
  }
  return best;
}

int choose_gemm_int4_split(int num_tokens, int rows, int group, int num_sms, std::size_t max_shared_bytes) {
  // By bench/bench_gemm_int4.py on an H200: more tokens and enough rows keep the other tiles busy.
  if (num_tokens > 32 && ceil_div(rows, 64) >= num_sms) return -1;
  return find_gemm_int4_split(num_tokens, group, max_shared_bytes);
}

bool has_gemm_int4_split(int num_tokens, int group) {
  return find_gemm_int4_split(num_tokens, group, device_traits().max_shared_bytes) >= 0;
}

void load_gemm_int4_split(int group) {
  with_split_of_group(group, -1, [](auto each) { each.load(); });
}

void launch_gemm_int4_split(const GemmInt4Params& p, int tile, int group, cudaStream_t stream, bool pdl) {
  with_split_of_group(group, tile, [&](auto chosen) { chosen.launch_async(p, stream, pdl); });
}

}  // namespace edgellm::kernels
