// RoPE for many tokens, with writing of keys and values.
#pragma once

#include "edgellm/kernels/types.hpp"

namespace edgellm::kernels {

// qkv rows, each of one token of any sequence: rotated queries to q_out, rotated keys and values to the cache.
struct RopeKvWriteArgs {
  const void* qkv = nullptr;  // (num_tokens, (num_heads + 2 * kv_heads) * head_dim), float or bf16
  bool qkv_is_f32 = false;
  ProductScales scales;         // of qkv
  const float* bias = nullptr;  // ((num_heads + 2 * kv_heads) * head_dim) added first, or null; 16-byte aligned
  KvLayer kv;
  RopeTables rope;
  const int32_t* slots = nullptr;      // (num_tokens)
  const int32_t* positions = nullptr;  // (num_tokens); a negative one: the row is read, and not written
  __nv_bfloat16* q_out = nullptr;      // (num_tokens, num_heads * head_dim)
  int num_tokens = 0;
  int num_heads = 0;
};
void rope_kv_write_async(const RopeKvWriteArgs& args, cudaStream_t stream, bool pdl);

}  // namespace edgellm::kernels
