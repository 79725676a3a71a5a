// Many tokens a sequence: RoPE with writing of keys and values, then causal attention on tensor cores over the slot.
#pragma once

#include "edgellm/kernels/types.hpp"

namespace edgellm::kernels {

// qkv rows, each of one token of any sequence: rotated queries to q_out, rotated keys and values to the cache.
struct RopeKvWriteArgs {
  const void* qkv = nullptr;  // (num_tokens, (num_heads + 2 * kv_heads) * head_dim), float or bf16
  bool qkv_is_f32 = false;
  ProductScales scales;         // of qkv
  const float* bias = nullptr;  // ((num_heads + 2 * kv_heads) * head_dim) added first, or null
  KvLayer kv;
  RopeTables rope;
  const int32_t* slots = nullptr;      // (num_tokens)
  const int32_t* positions = nullptr;  // (num_tokens); a negative one marks a row to skip
  __nv_bfloat16* q_out = nullptr;      // (num_tokens, num_heads * head_dim)
  int num_tokens = 0;
  int num_heads = 0;
};
void rope_kv_write_async(const RopeKvWriteArgs& args, cudaStream_t stream, bool pdl);

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
