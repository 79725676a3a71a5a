// One new token a sequence: RoPE, writing its key and value, and attention over its slot, in one kernel.
#pragma once

#include "edgellm/kernels/types.hpp"

namespace edgellm::kernels {

constexpr int kMaxDecodeBatch = 16;
constexpr int kMinDecodeSplits = 8;
constexpr int kMaxDecodeSplits = 64;
constexpr int kPositionsPerSplit = 128;  // beyond which a sequence is split further, where that is allowed
constexpr int kLongContext = 8192;       // beyond which blocks have eight warps

// Blocks that share a sequence that attends to `length` tokens, at most `most_splits` (a power of two). It depends on
// nothing else, so that neither the batch nor the capacity of its slot changes the order of a sequence's sums.
constexpr int decode_attention_splits(int length, int most_splits) {
  int splits = most_splits < kMinDecodeSplits ? most_splits : kMinDecodeSplits;
  while (splits < most_splits && length > splits * kPositionsPerSplit) splits *= 2;
  return splits;
}

// Longest sequences that are launched alike attend to more tokens than one class and to at most the next.
constexpr int kContextClasses[] = {kMinDecodeSplits * kPositionsPerSplit, kLongContext, 1 << 30};
constexpr int decode_attention_class(int length) {
  int i = 0;
  while (length > kContextClasses[i]) i++;
  return kContextClasses[i];
}

// The `most_splits` with which one long sequence fills `num_sms` with about one block each: 8 to 64.
constexpr int decode_attention_most_splits(int num_kv_heads, int num_sms) {
  int splits = kMinDecodeSplits;
  while (splits < kMaxDecodeSplits && 2 * splits * num_kv_heads <= num_sms) splits *= 2;
  return splits;
}

struct DecodeAttentionArgs {
  const float* qkv = nullptr;  // (batch, (num_heads + 2 * kv_heads) * head_dim), before RoPE; 16-byte aligned
  KvLayer kv;
  RopeTables rope;
  const int32_t* slots = nullptr;      // (batch), distinct
  const int32_t* positions = nullptr;  // (batch) of the new token; the slot holds all before it. < 0: a free place
  __nv_bfloat16* out = nullptr;        // (batch, num_heads * head_dim)
  int batch = 1;
  int num_heads = 0;
  int window = 0;       // tokens attended to, the new one included; 0: all
  float scale = 0.0f;   // of the dot products; usually head_dim^-0.5
  int most_splits = 8;  // of a sequence, a power of two up to kMaxDecodeSplits; part of the result's bits
  int most_attended = kContextClasses[0];  // tokens that the batch's longest sequence attends to, or more
  int cluster = 0;                         // blocks that merge through shared memory: 1 or 8; 0: what the GPU does best
  bool exchanges = true;      // whether zeros are in `workspace` behind its counters, too: two clusters merge faster
  void* workspace = nullptr;  // decode_attention_workspace_bytes, zeroed once at load
};

// With `pdl`, the slot's tokens before the new one must have been written before the last kernel that was launched
// without: they are read while the predecessors run.
void decode_attention_async(const DecodeAttentionArgs& args, cudaStream_t stream, bool pdl);

// For all calls with at most this batch; one workspace serves all layers of a stream. For a batch of 0: of the
// counters, with which it begins.
std::size_t decode_attention_workspace_bytes(int max_batch, int num_heads, int head_dim);

}  // namespace edgellm::kernels
