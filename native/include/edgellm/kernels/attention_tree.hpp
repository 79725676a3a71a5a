// A tree of new tokens a sequence: RoPE, writing their keys and values, and attention under a packed mask.
#pragma once

#include "edgellm/kernels/types.hpp"

namespace edgellm::kernels {

constexpr int kMaxTreeTokens = 64;  // new tokens of a sequence: bits of a mask
constexpr int kMaxTreeSequences = 64;
constexpr int kMaxTreeSplits = 16;

// Sequence s owns rows starts[s] to starts[s + 1] - 1 of qkv, depths, masks and out: its new tokens, 1 to
// kMaxTreeTokens of them, parents before their children. The slot holds the prefix, positions 0 to P - 1 with
// P = positions[s]. New token i is rotated by position P + depths[i]; its key and value go to cache position P + i. It
// attends to the whole prefix, or what its window leaves of it, and to those new tokens j of its sequence that have bit
// j set in its mask (and lie in its window, by their depths).
//
// With `pdl` the kernel reads everything but qkv before its predecessor has finished: no kernel since the last launch
// without pdl may write starts, slots, positions, depths, masks or the prefix.
struct TreeAttentionArgs {
  const float* qkv = nullptr;  // (num_tokens, (num_heads + 2 * kv_heads) * head_dim), before RoPE
  KvLayer kv;
  RopeTables rope;
  const int32_t* starts = nullptr;     // (num_sequences + 1)
  const int32_t* slots = nullptr;      // (num_sequences), distinct
  const int32_t* positions = nullptr;  // (num_sequences) P. < 0, or no room in the slot: a free place, left alone
  const int32_t* depths = nullptr;     // (num_tokens) 0 at a root
  const uint64_t* masks = nullptr;     // (num_tokens) ancestors and the token itself
  __nv_bfloat16* out = nullptr;        // (num_tokens, num_heads * head_dim)
  int num_sequences = 1;
  int max_tokens = 0;  // upper bound of a sequence's tokens; shapes the grid
  int num_heads = 0;
  int window = 0;  // tokens attended to along a path, the token itself included; 0: all
  float scale = 0.0f;
  // Parts of a sequence that work side by side, each a cluster of eight blocks where the GPU has them, else one block.
  // 1 to kMaxTreeSplits, or 0: as many as fill the GPU. A short sequence uses fewer.
  int splits = 0;
  int most_rows = 0;          // queries of a block, 32 or 64; 0: what it has shared memory for
  void* workspace = nullptr;  // tree_attention_workspace_bytes, zeroed once at load
};

void tree_attention_async(const TreeAttentionArgs& args, cudaStream_t stream, bool pdl);

// For all calls whose num_sequences * max_tokens is at most this; one workspace serves all layers of a stream.
std::size_t tree_attention_workspace_bytes(int max_tokens, int num_heads, int head_dim);

}  // namespace edgellm::kernels
