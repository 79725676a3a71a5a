// Prefill's products with int4 weights as they are stored, without a copy of them in bf16.
#pragma once

#include "edgellm/kernels/types.hpp"

namespace edgellm::kernels {

// Shapes of a block's share: rows of the weight times tokens. All sum in the same order, so that they give the same
// bits.
struct GemmInt4Tile {
  int rows;
  int tokens;
};
inline constexpr GemmInt4Tile kGemmInt4Tiles[] = {{128, 128}, {128, 64}, {64, 64}, {64, 32}};
inline constexpr int kNumGemmInt4Tiles = static_cast<int>(sizeof(kGemmInt4Tiles) / sizeof(kGemmInt4Tiles[0]));

struct GemmInt4Args {
  WeightView weight;                 // int4, repacked (quantized.hpp)
  bool gate_up = false;              // as it was packed
  const __nv_bfloat16* x = nullptr;  // (num_tokens, cols)
  __nv_bfloat16* y = nullptr;        // (num_tokens, rows), rows in their original order
  int num_tokens = 0;
  int tile = -1;  // of kGemmInt4Tiles; -1: by the shape and the GPU
};

// The tile of a product with `num_tokens` tokens and `rows` rows on a GPU of so many multiprocessors, each of which has
// room for two blocks or for one.
int choose_gemm_int4_tile(int num_tokens, int rows, int num_sms, bool two_fit);

// Has CUDA load the code of every tile for weights in such groups, which else is at a tile's first launch.
void load_gemm_int4(int group);

// y = x W^T. A token's result does not depend on how many others there are.
void gemm_int4_async(const GemmInt4Args& args, cudaStream_t stream, bool pdl);

}  // namespace edgellm::kernels
