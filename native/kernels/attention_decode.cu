// Decode attention: workspace, number of splits, and the choice by head_dim.
#include <algorithm>
#include <cmath>
#include <stdexcept>
#include <string>

#include "attention_decode.cuh"

namespace edgellm::kernels {

extern template void launch_for_head_dim<64>(const DecodeAttentionArgs&, const DecodeAttentionParams&, cudaStream_t,
                                             bool);
extern template void launch_for_head_dim<80>(const DecodeAttentionArgs&, const DecodeAttentionParams&, cudaStream_t,
                                             bool);
extern template void launch_for_head_dim<96>(const DecodeAttentionArgs&, const DecodeAttentionParams&, cudaStream_t,
                                             bool);
extern template void launch_for_head_dim<128>(const DecodeAttentionArgs&, const DecodeAttentionParams&, cudaStream_t,
                                              bool);

namespace {

// Counters first: their place must not depend on the number of splits.
std::size_t counter_bytes(int batch, int num_heads) {
  return (static_cast<std::size_t>(batch) * num_heads * sizeof(unsigned int) + 255) / 256 * 256;
}

}  // namespace

std::size_t decode_attention_workspace_bytes(int max_batch, int num_heads, int head_dim) {
  const std::size_t rows = static_cast<std::size_t>(max_batch) * num_heads * kMaxDecodeSplits;
  return counter_bytes(max_batch, num_heads) + rows * (head_dim + 2) * sizeof(float);
}

int decode_attention_splits(int batch, int num_kv_heads, int max_length, int num_sms) {
  constexpr int kWorthwhile = 64;  // positions a split, below which merging costs more than it saves
  const int blocks = batch * num_kv_heads;
  const int by_length = std::max(1, max_length / kWorthwhile);
  if (by_length <= 4 * kClusterSplits || blocks * kClusterSplits >= num_sms) return kClusterSplits;
  // A block an SM holds too few loads in flight to use all of the memory's bandwidth: two are needed.
  return std::clamp(std::min(by_length, 2 * num_sms / blocks), kClusterSplits, kMaxDecodeSplits);
}

void decode_attention_async(const DecodeAttentionArgs& args, cudaStream_t stream, bool pdl) {
  assert(args.num_heads % args.kv.num_kv_heads == 0 && args.splits >= 1 && args.splits <= kMaxDecodeSplits);
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
  p.norm_eps = args.rope.norm_eps;
  p.scale = args.scale * 1.4426950408889634f;
  if (args.workspace) {
    const std::size_t rows = static_cast<std::size_t>(args.batch) * args.num_heads * args.splits;
    p.num_done = static_cast<unsigned int*>(args.workspace);
    p.partial_out =
        reinterpret_cast<float*>(static_cast<char*>(args.workspace) + counter_bytes(args.batch, args.num_heads));
    p.partial_max = p.partial_out + rows * args.kv.head_dim;
    p.partial_sum = p.partial_max + rows;
  }
  switch (args.kv.head_dim) {
    case 64:
      return launch_for_head_dim<64>(args, p, stream, pdl);
    case 80:
      return launch_for_head_dim<80>(args, p, stream, pdl);
    case 96:
      return launch_for_head_dim<96>(args, p, stream, pdl);
    case 128:
      return launch_for_head_dim<128>(args, p, stream, pdl);
    default:
      throw std::invalid_argument("head_dim " + std::to_string(args.kv.head_dim) +
                                  " has no attention kernel; there are 64, 80, 96 and 128");
  }
}

}  // namespace edgellm::kernels
