// Many tokens a sequence: causal attention on tensor cores over the slot, whose keys and values rope.hpp wrote.
#pragma once

#include "edgellm/kernels/types.hpp"

namespace edgellm::kernels {

// Sequence s owns rows starts[s] to starts[s + 1] - 1 of q and out, whose first row is at position positions[s] of
// slot slots[s]. Row i attends to all positions up to its own; its own key and value are already in the cache.
struct PrefillAttentionArgs {
  const __nv_bfloat16* q = nullptr;  // (num_tokens, num_heads * head_dim), rotated
  KvLayer kv;
  const int32_t* starts = nullptr;     // (num_sequences + 1)
  const int32_t* slots = nullptr;      // (num_sequences)
  const int32_t* positions = nullptr;  // (num_sequences)
  __nv_bfloat16* out = nullptr;        // (num_tokens, num_heads * head_dim)
  int num_sequences = 1;
  int max_tokens = 0;  // upper bound of a sequence's rows; shapes the grid
  int num_heads = 0;
  int window = 0;
  float scale = 0.0f;
};
void prefill_attention_async(const PrefillAttentionArgs& args, cudaStream_t stream, bool pdl);

}  // namespace edgellm::kernels
