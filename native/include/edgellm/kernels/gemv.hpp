// y = W x for 1 to 16 tokens: the decode step's matrix products, each with its prologue and epilogue fused.
#pragma once

#include "edgellm/kernels/lora.hpp"
#include "edgellm/kernels/types.hpp"

namespace edgellm::kernels {

constexpr int kMaxGemvTokens = 16;

enum class Epilogue : int {
  store_f32 = 0,   // out_f32 = y
  store_bf16 = 1,  // out_bf16 = y
  residual = 2,    // out_f32 += y, out_bf16 = its copy
  logits = 3,      // out_f32 = y, and block_max: one packed maximum a token and block of rows
  swiglu = 4,      // out_bf16 (num_tokens, rows / 2) = silu(y[:rows / 2]) * y[rows / 2:]; int4: packed with gate_up
  geglu = 5,       // the same with gelu_tanh
};

// Whether a gate row and the up row that goes with it make one output.
constexpr bool has_pairs(Epilogue epilogue) { return epilogue >= Epilogue::swiglu; }

struct GemvArgs {
  WeightView weight;                 // (rows, cols)
  const __nv_bfloat16* x = nullptr;  // (num_tokens, cols)
  // (num_tokens, cols) x before it was rounded, or null. With a gain, weights in bf16, and at most eight tokens or
  // batch_invariant, it is multiplied instead of x, as the sum of two bf16 numbers or in fp32.
  const float* x_f32 = nullptr;
  int num_tokens = 1;                   // 1 to kMaxGemvTokens
  const __nv_bfloat16* gain = nullptr;  // (cols) RMSNorm of x first, or null: none
  float norm_eps = 1e-6f;
  const float* bias = nullptr;  // (rows), or null
  Epilogue epilogue = Epilogue::store_f32;
  float* out_f32 = nullptr;                 // (num_tokens, rows)
  __nv_bfloat16* out_bf16 = nullptr;        // (num_tokens, rows) or (num_tokens, rows / 2)
  unsigned long long* block_max = nullptr;  // (num_tokens, gemv_num_blocks), or null; see sampling.hpp
  LoraView lora;                            // of a layer with adapters, whose h is computed; else empty
  // A token gets the same bits alone and among others: without the kernels that sum in another order for a single token
  // or for several.
  bool batch_invariant = false;
  // A tile configuration below gemv_num_tiles(args), or -1: by shape. With batch_invariant that of a single token, from
  // which several get another one that sums in the same order.
  int tile = -1;
};

void gemv_async(const GemvArgs& args, cudaStream_t stream, bool pdl);

// Blocks of rows that gemv_async(args) uses, of which a gain is a part: the row length of block_max. At most
// gemv_max_blocks(rows).
int gemv_num_blocks(const GemvArgs& args);
constexpr int gemv_max_blocks(int rows) { return (rows + 1) / 2; }

// Of what the numbers of tiles mean: another one with every change of a table of configurations or of their order.
constexpr int kGemvTilesVersion = 4;

// Tile configurations that fit the format, cols and num_tokens of `args`; the fastest differs with the shape and GPU.
int gemv_num_tiles(const GemvArgs& args);

// What would serve `args`, of which shapes, the epilogue and whether there is a gain count, on a GPU that need not be
// here.
struct GemvPlan {
  const char* family;        // fma, several, once, ring, resident, int4 or mma: how weights are read and multiplied
  int config;                // of the family's table
  int warps;                 // of a block
  int rows_per_block;        // of block_max
  std::size_t shared_bytes;  // of a block, at most
  int num_tiles;
};
GemvPlan plan_gemv(const GemvArgs& args, int num_sms, std::size_t max_shared_bytes);

}  // namespace edgellm::kernels
