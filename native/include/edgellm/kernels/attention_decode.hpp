// One new token a sequence: RoPE, writing its key and value, and attention over its slot, in one kernel.
#pragma once

#include "edgellm/kernels/types.hpp"

namespace edgellm::kernels {

struct DecodeAttentionArgs {
  const float* qkv = nullptr;  // (batch, (num_heads + 2 * kv_heads) * head_dim), before RoPE
  KvLayer kv;
  RopeTables rope;
  const int32_t* slots = nullptr;      // (batch), distinct
  const int32_t* positions = nullptr;  // (batch) of the new token; the slot holds all before it. < 0: a free place
  __nv_bfloat16* out = nullptr;        // (batch, num_heads * head_dim)
  int batch = 1;
  int num_heads = 0;
  int window = 0;      // tokens attended to, the new one included; 0: all
  float scale = 0.0f;  // of the dot products; usually head_dim^-0.5
  // Blocks that share one sequence and KV head. 8 uses a thread block cluster where the GPU has them and needs no
  // workspace there; any other number from 1 to kMaxDecodeSplits goes through the workspace.
  int splits = 8;
  void* workspace = nullptr;  // decode_attention_workspace_bytes, zeroed once at load
};

constexpr int kMaxDecodeSplits = 64;

void decode_attention_async(const DecodeAttentionArgs& args, cudaStream_t stream, bool pdl);

// For all calls with at most this batch; one workspace serves all layers of a stream.
std::size_t decode_attention_workspace_bytes(int max_batch, int num_heads, int head_dim);

// Splits that fill `num_sms` for sequences of up to `max_length` tokens: what a CUDA graph's context class should use.
int decode_attention_splits(int batch, int num_kv_heads, int max_length, int num_sms);

}  // namespace edgellm::kernels
