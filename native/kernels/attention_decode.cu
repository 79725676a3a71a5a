// Decode attention: workspace, and the choice by head_dim.
#include <cassert>
#include <cstdint>
#include <stdexcept>
#include <string>

#include "attention_decode_launch.cuh"

namespace edgellm::kernels {

extern template void launch_for_head_dim<64>(const DecodeAttentionArgs&, const DecodeAttentionParams&, cudaStream_t,
                                             bool);
extern template void launch_for_head_dim<80>(const DecodeAttentionArgs&, const DecodeAttentionParams&, cudaStream_t,
                                             bool);
extern template void launch_for_head_dim<96>(const DecodeAttentionArgs&, const DecodeAttentionParams&, cudaStream_t,
                                             bool);
extern template void launch_for_head_dim<128>(const DecodeAttentionArgs&, const DecodeAttentionParams&, cudaStream_t,
                                              bool);
extern template void launch_for_head_dim<256>(const DecodeAttentionArgs&, const DecodeAttentionParams&, cudaStream_t,
                                              bool);

namespace {

// Counters and exchanged sums first, as many for every batch: calls of different batches and splits must find them, and
// zeros in them, at the same place.
std::size_t counter_bytes(int num_heads) {
  return static_cast<std::size_t>(kMaxDecodeBatch) * num_heads * kMaxCluster * sizeof(unsigned int);
}
std::size_t exchanged_bytes(int num_heads, int head_dim) {
  return static_cast<std::size_t>(kMaxDecodeBatch) * num_heads * head_dim / 2 * sizeof(uint4);
}

[[maybe_unused]] bool is_power_of_two(int n) { return n > 0 && (n & (n - 1)) == 0; }

}  // namespace

std::size_t decode_attention_workspace_bytes(int max_batch, int num_heads, int head_dim) {
  if (max_batch == 0) return counter_bytes(num_heads);
  const std::size_t rows = static_cast<std::size_t>(max_batch) * num_heads * kMaxDecodeSplits;
  return counter_bytes(num_heads) + exchanged_bytes(num_heads, head_dim) + rows * (head_dim + 2) * sizeof(float);
}

void decode_attention_async(const DecodeAttentionArgs& args, cudaStream_t stream, bool pdl) {
  assert(args.num_heads % args.kv.num_kv_heads == 0 && args.batch <= kMaxDecodeBatch);
  assert(reinterpret_cast<std::uintptr_t>(args.qkv) % 16 == 0);
  assert(is_power_of_two(args.most_splits) && args.most_splits <= kMaxDecodeSplits && args.workspace);
  DecodeAttentionParams p = {};
  p.qkv = args.qkv;
  p.cache = args.kv.data;
  p.cos = args.rope.cos;
  p.sin = args.rope.sin;
  p.q_gain = args.rope.q_gain;
  p.k_gain = args.rope.k_gain;
  p.slots = args.slots;
  p.positions = args.positions;
  p.out = args.out;
  p.num_heads = args.num_heads;
  p.num_kv_heads = args.kv.num_kv_heads;
  p.capacity = args.kv.capacity;
  p.window = args.window;
  p.most_splits = args.most_splits;
  p.norm_eps = args.rope.norm_eps;
  p.scale = args.scale * 1.4426950408889634f;
  p.num_done = static_cast<unsigned int*>(args.workspace);
  char* behind = static_cast<char*>(args.workspace) + counter_bytes(args.num_heads);
  if (args.exchanges) p.exchanged = reinterpret_cast<uint4*>(behind);
  p.partial_out = reinterpret_cast<float*>(behind + exchanged_bytes(args.num_heads, args.kv.head_dim));
  switch (args.kv.head_dim) {
    case 64:
      return launch_for_head_dim<64>(args, p, stream, pdl);
    case 80:
      return launch_for_head_dim<80>(args, p, stream, pdl);
    case 96:
      return launch_for_head_dim<96>(args, p, stream, pdl);
    case 128:
      return launch_for_head_dim<128>(args, p, stream, pdl);
    case 256:
      return launch_for_head_dim<256>(args, p, stream, pdl);
    default:
      throw std::invalid_argument("head_dim " + std::to_string(args.kv.head_dim) +
                                  " has no attention kernel; there are 64, 80, 96, 128 and 256");
  }
}

}  // namespace edgellm::kernels
