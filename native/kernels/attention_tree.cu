// Tree attention: workspace, and the choice by head_dim.
#include <cassert>
#include <stdexcept>
#include <string>

#include "attention_tree.cuh"

namespace edgellm::kernels {

extern template void launch_tree_head_dim<64>(const TreeAttentionArgs&, const TreeAttentionParams&, cudaStream_t, bool);
extern template void launch_tree_head_dim<80>(const TreeAttentionArgs&, const TreeAttentionParams&, cudaStream_t, bool);
extern template void launch_tree_head_dim<96>(const TreeAttentionArgs&, const TreeAttentionParams&, cudaStream_t, bool);
extern template void launch_tree_head_dim<128>(const TreeAttentionArgs&, const TreeAttentionParams&, cudaStream_t,
                                               bool);
extern template void launch_tree_head_dim<256>(const TreeAttentionArgs&, const TreeAttentionParams&, cudaStream_t,
                                               bool);

namespace {

// Counters first, and of a fixed size: a call must not write its sums where another call has counters.
std::size_t tree_counter_bytes(int num_heads, int head_dim) {
  const auto chunks = static_cast<std::size_t>(most_tree_chunks(num_heads, head_dim));
  return (chunks * kTreeCluster * sizeof(unsigned int) + 255) / 256 * 256;
}

}  // namespace

std::size_t tree_attention_workspace_bytes(int max_tokens, int num_heads, int head_dim) {
  const std::size_t rows = static_cast<std::size_t>(max_tokens) * num_heads * kMaxTreeSplits;
  return tree_counter_bytes(num_heads, head_dim) + rows * (head_dim + 2) * sizeof(float);
}

void tree_attention_async(const TreeAttentionArgs& args, cudaStream_t stream, bool pdl) {
  assert(args.num_heads % args.kv.num_kv_heads == 0 && args.splits >= 0 && args.splits <= kMaxTreeSplits);
  assert(args.max_tokens >= 1 && args.max_tokens <= kMaxTreeTokens);
  assert(args.num_sequences >= 1 && args.num_sequences <= kMaxTreeSequences);
  TreeAttentionParams p = {};
  p.qkv = args.qkv;
  p.cache = args.kv.data;
  p.cos = args.rope.cos;
  p.sin = args.rope.sin;
  p.q_gain = args.rope.q_gain;
  p.k_gain = args.rope.k_gain;
  p.starts = args.starts;
  p.slots = args.slots;
  p.positions = args.positions;
  p.depths = args.depths;
  p.masks = args.masks;
  p.out = args.out;
  p.num_done = static_cast<unsigned int*>(args.workspace);
  p.partial_out = reinterpret_cast<float*>(static_cast<char*>(args.workspace) +
                                           tree_counter_bytes(args.num_heads, args.kv.head_dim));
  p.num_heads = args.num_heads;
  p.num_kv_heads = args.kv.num_kv_heads;
  p.capacity = args.kv.capacity;
  p.window = args.window;
  p.splits = args.splits;
  p.norm_eps = args.rope.norm_eps;
  p.scale = args.scale * 1.4426950408889634f;
  switch (args.kv.head_dim) {
    case 64:
      return launch_tree_head_dim<64>(args, p, stream, pdl);
    case 80:
      return launch_tree_head_dim<80>(args, p, stream, pdl);
    case 96:
      return launch_tree_head_dim<96>(args, p, stream, pdl);
    case 128:
      return launch_tree_head_dim<128>(args, p, stream, pdl);
    case 256:
      return launch_tree_head_dim<256>(args, p, stream, pdl);
    default:
      throw std::invalid_argument("head_dim " + std::to_string(args.kv.head_dim) +
                                  " has no attention kernel; there are 64, 80, 96, 128 and 256");
  }
}

}  // namespace edgellm::kernels
