// Prefill's products with int4 weights as they are stored, without a copy of them in bf16.
#pragma once

#include <cstddef>

#include "edgellm/kernels/types.hpp"

namespace edgellm::kernels {

// Shapes of a block's share: rows of the weight times tokens. All that are not split sum in the same order, so that
// they give the same bits. A split one is for few tokens, no more than it has: its warps divide the input features.
struct GemmInt4Tile {
  int rows;
  int tokens;
  bool split = false;
};
inline constexpr GemmInt4Tile kGemmInt4Tiles[] = {{128, 128},     {128, 64},      {64, 64},      {64, 32},
                                                  {32, 16, true}, {64, 32, true}, {32, 64, true}};
inline constexpr int kNumGemmInt4Tiles = static_cast<int>(sizeof(kGemmInt4Tiles) / sizeof(kGemmInt4Tiles[0]));

struct GemmInt4Args {
  WeightView weight;                 // int4, repacked (quantized.hpp)
  bool gate_up = false;              // as it was packed
  const __nv_bfloat16* x = nullptr;  // (num_tokens, cols)
  __nv_bfloat16* y = nullptr;        // (num_tokens, rows), rows in their original order; or null, then y_f32
  float* y_f32 = nullptr;            // the same, where has_gemm_int4_split says so
  int num_tokens = 0;
  bool row_invariant = true;  // a token's result does not depend on how many others there are: no split tiles
  int tile = -1;              // of kGemmInt4Tiles; -1: by the shape and the GPU
};

// The tile of a product with `num_tokens` tokens and `rows` rows on a GPU of so many multiprocessors, each of which has
// room for two blocks or for one; of those that are not split.
int choose_gemm_int4_tile(int num_tokens, int rows, int num_sms, bool two_fit);
// The smallest split one that has so many tokens, for weights in such groups and blocks with so much shared memory; or
// -1.
int find_gemm_int4_split(int num_tokens, int group, std::size_t max_shared_bytes);
// The same, but -1 also where another tile is faster.
int choose_gemm_int4_split(int num_tokens, int rows, int group, int num_sms, std::size_t max_shared_bytes);
// Whether there is one on the current GPU.
bool has_gemm_int4_split(int num_tokens, int group);

// Has CUDA load the code of every tile for weights in such groups, which else is at a tile's first launch.
void load_gemm_int4(int group);

// y = x W^T.
void gemm_int4_async(const GemmInt4Args& args, cudaStream_t stream, bool pdl);

}  // namespace edgellm::kernels
