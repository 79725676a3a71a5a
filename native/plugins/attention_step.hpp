// One attention step on the kernels: a token a sequence, a prompt, or a tree of drafts.
#pragma once

#include "attention_plugin.hpp"
#include "convert.hpp"
#include "edgellm/kernels/types.hpp"

namespace edgellm::plugins {

// One call of enqueue: what its three kinds of step share.
struct AttentionStep {
  const AttentionSettings& settings;
  std::int64_t batch;
  std::int64_t each;  // tokens of a sequence
  kernels::KvLayer kv;
  kernels::RopeTables rope;
  const float* qkv;        // (batch * each, width), or null: then qkv_bf16
  const void* qkv_bf16;    // the engine's own
  __nv_bfloat16* queries;  // (batch * each, q_width), of prompts
  __nv_bfloat16* out;      // (batch * each, q_width)
  const PrepareArgs& lists;
  const std::uint64_t* masks;  // (batch, each), of trees
  void* workspace;
  cudaStream_t stream;

  std::size_t q_width() const { return static_cast<std::size_t>(settings.num_heads) * settings.head_dim; }
  std::size_t width() const {
    return q_width() + 2 * static_cast<std::size_t>(settings.num_kv_heads) * settings.head_dim;
  }
  // What the arguments of all three kernels have. Sequences from `b` on.
  template <class Args>
  Args arguments(std::int64_t b) const {
    Args args;
    args.kv = kv;
    args.slots = lists.slots + b;
    args.positions = lists.positions + b;
    args.out = out + static_cast<std::size_t>(b * each) * q_width();
    args.num_heads = settings.num_heads;
    args.window = settings.window;
    args.scale = settings.scale;
    return args;
  }
};

// Trees where there are masks, else decoding where sequences have one token each, else prompts.
void attention_async(const AttentionStep& step);

}  // namespace edgellm::plugins
