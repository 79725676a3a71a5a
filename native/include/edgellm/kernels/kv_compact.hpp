// After a draft tree was verified: the accepted path's keys and values move together, and the slot is linear again.
#pragma once

#include "edgellm/kernels/types.hpp"

namespace edgellm::kernels {

// In every slice (a layer's keys and values, or one of the two), position P + i of the slot gets what position P +
// paths[s][i] has, for i below counts[s]. A path's nodes ascend (parents come before their children), so no source is
// overwritten before it is read: in place.
struct KvCompactArgs {
  void* cache = nullptr;  // (num_slices, num_slots, num_heads, capacity, head_dim)
  KvFormat format = KvFormat::bf16;
  int num_slices = 0;
  int num_slots = 0;
  int num_heads = 0;  // KV heads of a slice, twice as many where it has keys and values
  int capacity = 0;
  int head_dim = 0;                    // 64, 80, 96, 128 or 256
  const int32_t* slots = nullptr;      // (num_sequences), distinct
  const int32_t* positions = nullptr;  // (num_sequences) P. < 0: a free place, left alone
  const int32_t* paths = nullptr;      // (num_sequences, max_nodes), ascending; P + path must lie in the slot
  const int32_t* counts = nullptr;     // (num_sequences) nodes of the path, at most max_nodes; 0 or less: nothing moves
  int num_sequences = 1;
  int max_nodes = 0;
};
void kv_compact_async(const KvCompactArgs& args, cudaStream_t stream, bool pdl);

}  // namespace edgellm::kernels
