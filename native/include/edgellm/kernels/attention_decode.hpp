// One new token a sequence: RoPE, writing its key and value, and attention over its slot, in one kernel.
#pragma once

#include "edgellm/kernels/types.hpp"

namespace edgellm::kernels {

constexpr int kMaxDecodeBatch = 16;
constexpr int kMinDecodeSplits = 8;
constexpr int kMaxDecodeSplits = 64;
constexpr int kPositionsPerSplit = 128;  // beyond which a sequence is split further, where that is allowed
constexpr int kLongContext = 8192;       // beyond which blocks have eight warps

// Parts in which a sequence that attends to `length` tokens is computed, at most `most_splits` (a power of two). It
// depends on nothing else, so that neither the batch nor the capacity of its slot changes the order of a sequence's
// sums.
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

// The `most_splits` with which one long sequence fills `num_sms` with about one block each: 8 to 64. More than two
// eights are merged through more memory, and are worth that up to half of the GPU only.
constexpr int decode_attention_most_splits(int num_kv_heads, int num_sms) {
  int splits = kMinDecodeSplits;
  while (splits < kMaxDecodeSplits) {
    const int num_blocks = 2 * splits * num_kv_heads;
    if (num_blocks > (splits < 2 * kMinDecodeSplits ? num_sms : num_sms / 2)) break;
    splits *= 2;
  }
  return splits;
}

// How many of `splits` a block computes one after the other when there are `rows` of them, a row being a sequence's KV
// head and up to eight of its query heads: 1, 2, 4 or 8. `blocks_per_sm` are those that fit.
constexpr int decode_attention_splits_per_block(int splits, int rows, int num_sms, int blocks_per_sm) {
  const auto num_blocks = [&](int each) { return rows * (splits / each); };
  // Of large blocks, one a multiprocessor, the fewest waves, whose time is that of so many splits.
  if (blocks_per_sm == 1) {
    const auto time = [&](int each) { return (num_blocks(each) + num_sms - 1) / num_sms * each; };
    int best = 1;
    for (int each = 2; each <= kMinDecodeSplits && each <= splits; each *= 2) {
      if (time(each) <= time(best)) best = each;
    }
    return best;
  }
  // Of others so few that the next kernel's find room beside them. More than four were slower at any number.
  int each = 1;
  while (each < 4 && each < splits && 2 * num_blocks(each) > (2 * blocks_per_sm - 1) * num_sms) each *= 2;
  return each;
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
  int splits_per_block = 0;                // 1, 2, 4 or 8, one after the other; 0: what the GPU does best
  int cluster = 0;                         // most blocks that merge through shared memory: 1 or 8; 0: what is best
  bool exchanges = true;      // whether zeros are in `workspace` behind its counters, too: two eights merge faster
  void* workspace = nullptr;  // decode_attention_workspace_bytes, zeroed once at load
};

// With `pdl`, the slot's tokens before the new one must have been written before the last kernel that was launched
// without: they are read while the predecessors run.
void decode_attention_async(const DecodeAttentionArgs& args, cudaStream_t stream, bool pdl);

// For all calls with at most this batch; one workspace serves all layers of a stream. For a batch of 0: of the
// counters, with which it begins.
std::size_t decode_attention_workspace_bytes(int max_batch, int num_heads, int head_dim);

}  // namespace edgellm::kernels
