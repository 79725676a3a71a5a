// Low-rank adapters of linear layers (LoRA, arXiv 2106.09685): y = W x + B (A x), where each token may have another
// adapter or none. One kernel computes h = A x and brings B into L2; the GEMV adds B h when it finishes its rows.
#pragma once

#include <climits>

#include "edgellm/kernels/types.hpp"

namespace edgellm::kernels {

constexpr int kMaxLoraRank = 64;
constexpr int kMaxLoraTargets = 3;  // that one linear layer stacks: q, k and v
constexpr int kLoraAlign = 8;       // ranks are padded to this with zeros, so that loads are of 16 bytes

constexpr int padded_lora_rank(int rank) { return (rank + kLoraAlign - 1) / kLoraAlign * kLoraAlign; }

// One adapter's part of one linear layer, in device memory. The layer's rows are those of up to three targets, each
// with its own rank; the targets' A are stacked, and a row's B only meets the part of h that is its target's.
struct alignas(16) LoraLinear {
  const __nv_bfloat16* a = nullptr;  // (num_a_rows, cols): the targets' A, each padded to its padded rank
  const __nv_bfloat16* b = nullptr;  // the targets' B, one after the other: (its rows, its padded rank), scale included
  std::int32_t num_a_rows = 0;       // sum of the padded ranks
  std::int32_t first_row[2] = {INT_MAX, INT_MAX};  // of the layer, where the second and third target begin
  std::int32_t first_b[2] = {0, 0};                // elements into b, where theirs begins
  std::uint8_t rank[4] = {0, 0, 0, 0};             // padded; 0: the target is not adapted
  std::uint8_t first_h[4] = {0, 0, 0, 0};          // elements into a token's h, where the target's begin
  std::int32_t num_b = 0;                          // elements of b
};
static_assert(sizeof(LoraLinear) == 48);

// What one call of a linear layer needs to know of all adapters.
struct LoraView {
  const LoraLinear* linears = nullptr;     // (number of adapters) of this layer, or null: no adapters
  const std::int32_t* adapters = nullptr;  // (num_tokens): 1 + index into linears, or 0: none. Constant in a step
  float* h = nullptr;                      // (num_tokens, h_stride): A x
  int h_stride = 0;                        // at least every num_a_rows

  // The same without the first tokens.
  LoraView from_token(int token) const {
    return {linears, adapters + token, h + static_cast<std::ptrdiff_t>(token) * h_stride, h_stride};
  }
};

struct LoraDownArgs {
  LoraView lora;
  const __nv_bfloat16* x = nullptr;     // (num_tokens, cols), 16-byte aligned
  const __nv_bfloat16* gain = nullptr;  // (cols) RMSNorm of x first, or null: none
  float norm_eps = 1e-6f;
  int num_tokens = 1;
  int cols = 0;  // a multiple of 8
};

// lora.h[t] = A x[t] with the adapter of each token; h of a token without one, and past num_a_rows, is left as it is.
void lora_down_async(const LoraDownArgs& args, cudaStream_t stream, bool pdl);

// Many tokens with one adapter, after the layer's product: y += B (A x), whose h = A x is rounded to bf16.
struct LoraPrefillArgs {
  LoraLinear linear;
  int first_rows[kMaxLoraTargets + 1] = {0, 0, 0, 0};  // of the layer, where each target begins; multiples of 8
  int num_targets = 1;
  int rows = 0;                      // of the layer: first_rows[num_targets]
  const __nv_bfloat16* x = nullptr;  // (num_tokens, cols)
  __nv_bfloat16* h = nullptr;        // (num_tokens, linear.num_a_rows): scratch
  __nv_bfloat16* y = nullptr;        // (num_tokens, rows)
  int num_tokens = 0;
  int cols = 0;  // a multiple of 16
};

// A token's result does not depend on how many there are.
void lora_prefill_async(const LoraPrefillArgs& args, cudaStream_t stream, bool pdl);

}  // namespace edgellm::kernels
