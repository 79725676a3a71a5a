// LoRA for many tokens of one adapter: h = x A^T on tensor cores, then y += h B^T, which costs one pass over y.
//
// As in gemv_mma.cuh the order of the summed index is permuted inside a block of 64, alike in both operands, so that a
// lane's share of a row is 32 contiguous bytes: fragments are loaded from memory as they are used.
#include <cassert>

#include "device.cuh"
#include "edgellm/kernels/lora.hpp"
#include "launch.hpp"

namespace edgellm::kernels {

namespace {

constexpr int kWarps = 8;
constexpr int kDownTokens = 32;  // of a block of the first kernel: two tiles
constexpr int kDownRows = 64;    // of A, a block: eight tiles
constexpr int kUpTokens = 64;    // of a block of the second kernel: four tiles, one after the other
constexpr int kUpRows = 32;  // of y, a warp: four tiles, whose columns are dealt out so that a lane has eight in a row
constexpr int kBlockColumns = 64;

// Columns t * 16 to t * 16 + 15 of a block of 64: words 2 s and 2 s + 1 are what step s of four multiplies.
template <uint4 (*kLoad)(const void*)>
__device__ __forceinline__ void load_words(const bf16* row, int column, int cols, bool active, uint32_t* words) {
#pragma unroll
  for (int i = 0; i < 2; i++) {
    const uint4 v = active && column + 8 * i < cols ? kLoad(row + column + 8 * i) : make_uint4(0, 0, 0, 0);
    words[4 * i] = v.x, words[4 * i + 1] = v.y, words[4 * i + 2] = v.z, words[4 * i + 3] = v.w;
  }
}

// The four steps of a tile of 16 tokens (rows g and g + 8) and 8 rows of the other operand (row g).
__device__ __forceinline__ void multiply(float* sums, const uint32_t (*tokens)[8], const uint32_t* other) {
#pragma unroll
  for (int s = 0; s < 4; s++) {
    const uint32_t a[4] = {tokens[0][2 * s], tokens[1][2 * s], tokens[0][2 * s + 1], tokens[1][2 * s + 1]};
    mma_bf16(sums, a, other[2 * s], other[2 * s + 1]);
  }
}

// A block: 32 tokens and 64 rows of A; its warps share the input features in blocks of 64.
__global__ void __launch_bounds__(kWarps * 32) lora_prefill_down_kernel(const __grid_constant__ LoraPrefillArgs p) {
  constexpr int kTokenTiles = kDownTokens / 16, kRowTiles = kDownRows / 8;
  __shared__ float partial[kWarps][16][kDownRows + 4];
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, g = lane >> 2, t = lane & 3;
  const int first_token = blockIdx.x * kDownTokens, first_row = blockIdx.y * kDownRows;
  const int num_rows = p.linear.num_a_rows, num_blocks = ceil_div(p.cols, kBlockColumns);
  start_dependents();
  wait_for_predecessor();

  float sums[kTokenTiles][kRowTiles][4] = {};
  for (int block = warp; block < num_blocks; block += kWarps) {
    const int column = block * kBlockColumns + t * 16;
    uint32_t tokens[kTokenTiles][2][8];
#pragma unroll
    for (int m = 0; m < kTokenTiles; m++) {
#pragma unroll
      for (int i = 0; i < 2; i++) {
        const int token = first_token + m * 16 + g + 8 * i;
        load_words<load_activation>(p.x + static_cast<std::size_t>(token) * p.cols, column, p.cols,
                                    token < p.num_tokens, tokens[m][i]);
      }
    }
#pragma unroll
    for (int n = 0; n < kRowTiles; n++) {
      if (first_row + n * 8 >= num_rows) break;  // alike in all lanes: num_rows is a multiple of 8
      const int row = first_row + n * 8 + g;
      uint32_t words[8];
      load_words<load_constant>(p.linear.a + static_cast<std::size_t>(row) * p.cols, column, p.cols, true, words);
#pragma unroll
      for (int m = 0; m < kTokenTiles; m++) multiply(sums[m][n], tokens[m], words);
    }
  }

#pragma unroll
  for (int m = 0; m < kTokenTiles; m++) {
    __syncthreads();  // the tile before has been summed
#pragma unroll
    for (int n = 0; n < kRowTiles; n++) {
#pragma unroll
      for (int i = 0; i < 4; i++) partial[warp][g + 8 * (i >> 1)][n * 8 + 2 * t + (i & 1)] = sums[m][n][i];
    }
    __syncthreads();
    for (int i = threadIdx.x; i < 16 * kDownRows; i += kWarps * 32) {
      const int token = first_token + m * 16 + i / kDownRows, row = first_row + i % kDownRows;
      if (token >= p.num_tokens || row >= num_rows) continue;
      float sum = 0.0f;
#pragma unroll
      for (int w = 0; w < kWarps; w++) sum += partial[w][i / kDownRows][i % kDownRows];
      p.h[static_cast<std::size_t>(token) * num_rows + row] = __float2bfloat16(sum);
    }
  }
}

// A warp: 32 rows of one target, for the 64 tokens of its block. Column 2 t + e of tile n is row 8 t + 2 n + e.
__global__ void __launch_bounds__(kWarps * 32) lora_prefill_up_kernel(const __grid_constant__ LoraPrefillArgs p) {
  constexpr int kTiles = kUpRows / 8;
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, g = lane >> 2, t = lane & 3;
  const int target = blockIdx.z, first_token = blockIdx.x * kUpTokens;
  const int rank = p.linear.rank[target], num_rows = p.first_rows[target + 1] - p.first_rows[target];
  const int first_row = (blockIdx.y * kWarps + warp) * kUpRows;  // of the target
  const bf16* b = p.linear.b + (target == 0 ? 0 : p.linear.first_b[target - 1]);
  const bool active = rank > 0 && first_row < num_rows;  // alike in all lanes

  uint32_t words[kTiles][8];
#pragma unroll
  for (int n = 0; n < kTiles; n++) {
    const int row = first_row + (g >> 1) * 8 + 2 * n + (g & 1);
    load_words<load_constant>(b + static_cast<std::size_t>(row) * rank, t * 16, rank, active && row < num_rows,
                              words[n]);
  }
  start_dependents();
  wait_for_predecessor();
  if (!active) return;

  const bool has_rows = first_row + 8 * t < num_rows;  // this lane's eight: num_rows is a multiple of 8
  for (int first = first_token; first < min(first_token + kUpTokens, p.num_tokens); first += 16) {
    uint32_t tokens[2][8];
    uint4 old[2];
#pragma unroll
    for (int i = 0; i < 2; i++) {
      const int token = first + g + 8 * i;
      const bool inside = token < p.num_tokens;
      load_words<load_l2>(p.h + static_cast<std::size_t>(token) * p.linear.num_a_rows + p.linear.first_h[target],
                          t * 16, rank, inside, tokens[i]);
      old[i] = inside && has_rows ? load_l2(static_cast<const void*>(p.y + static_cast<std::size_t>(token) * p.rows +
                                                                     p.first_rows[target] + first_row + 8 * t))
                                  : make_uint4(0, 0, 0, 0);
    }
    float sums[kTiles][4] = {};
#pragma unroll
    for (int n = 0; n < kTiles; n++) multiply(sums[n], tokens, words[n]);
#pragma unroll
    for (int i = 0; i < 2; i++) {
      const int token = first + g + 8 * i;
      if (token >= p.num_tokens || !has_rows) continue;
      float ys[8];
      unpack_bf16(old[i], ys);
      uint4 sum;
      sum.x = pack_bf16(ys[0] + sums[0][2 * i], ys[1] + sums[0][2 * i + 1]);
      sum.y = pack_bf16(ys[2] + sums[1][2 * i], ys[3] + sums[1][2 * i + 1]);
      sum.z = pack_bf16(ys[4] + sums[2][2 * i], ys[5] + sums[2][2 * i + 1]);
      sum.w = pack_bf16(ys[6] + sums[3][2 * i], ys[7] + sums[3][2 * i + 1]);
      *reinterpret_cast<uint4*>(p.y + static_cast<std::size_t>(token) * p.rows + p.first_rows[target] + first_row +
                                8 * t) = sum;
    }
  }
}

}  // namespace

void lora_prefill_async(const LoraPrefillArgs& args, cudaStream_t stream, bool pdl) {
  assert(args.cols % 16 == 0 && args.rows % 8 == 0);
  if (args.linear.num_a_rows == 0 || args.num_tokens == 0) return;
  int most_rows = 0;
  for (int i = 0; i < args.num_targets; i++) {
    const int rows = args.first_rows[i + 1] - args.first_rows[i];
    if (args.linear.rank[i] > 0 && rows > most_rows) most_rows = rows;
  }
  launch(lora_prefill_down_kernel,
         dim3(ceil_div(args.num_tokens, kDownTokens), ceil_div(args.linear.num_a_rows, kDownRows)), dim3(kWarps * 32),
         0, stream, pdl, args);
  launch(lora_prefill_up_kernel,
         dim3(ceil_div(args.num_tokens, kUpTokens), ceil_div(most_rows, kWarps * kUpRows), args.num_targets),
         dim3(kWarps * 32), 0, stream, pdl, args);
}

}  // namespace edgellm::kernels
