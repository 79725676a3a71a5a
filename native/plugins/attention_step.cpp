#include "attention_step.hpp"

#include <algorithm>

#include "../kernels/launch.hpp"
#include "edgellm/kernels/attention_decode.hpp"
#include "edgellm/kernels/attention_prefill.hpp"
#include "edgellm/kernels/attention_tree.hpp"
#include "edgellm/kernels/rope.hpp"

namespace edgellm::plugins {
namespace {

void decode_async(const AttentionStep& step) {
  const int num_sms = kernels::device_traits().num_sms;
  for (std::int64_t b = 0; b < step.batch; b += kernels::kMaxDecodeBatch) {
    auto args = step.arguments<kernels::DecodeAttentionArgs>(b);
    args.qkv = step.qkv + static_cast<std::size_t>(b) * step.width();
    args.rope = step.rope;
    args.batch = static_cast<int>(std::min<std::int64_t>(step.batch - b, kernels::kMaxDecodeBatch));
    args.most_splits = kernels::decode_attention_most_splits(step.settings.num_kv_heads, num_sms);
    // The host does not know the lengths: as many as a full cache needs, of which a short sequence's leave at once.
    args.most_attended = step.kv.capacity;
    args.exchanges = false;  // only the counters are cleared
    args.workspace = step.workspace;
    kernels::decode_attention_async(args, step.stream, false);
  }
}

void tree_async(const AttentionStep& step) {
  for (std::int64_t b = 0; b < step.batch; b++) {
    const auto first = static_cast<std::size_t>(b * step.each);
    auto args = step.arguments<kernels::TreeAttentionArgs>(b);
    args.qkv = step.qkv + first * step.width();
    args.rope = step.rope;
    args.starts = step.lists.starts + 2 * b;
    args.depths = step.lists.depths + first;
    args.masks = step.masks + first;
    args.max_tokens = static_cast<int>(step.each);
    args.workspace = step.workspace;
    kernels::tree_attention_async(args, step.stream, false);
  }
}

void prompt_async(const AttentionStep& step) {
  kernels::RopeKvWriteArgs write;
  write.qkv = step.qkv ? static_cast<const void*>(step.qkv) : step.qkv_bf16;
  write.qkv_is_f32 = step.qkv != nullptr;
  write.kv = step.kv;
  write.rope = step.rope;
  write.slots = step.lists.token_slots;
  write.positions = step.lists.token_positions;
  write.q_out = step.queries;
  write.num_tokens = static_cast<int>(step.batch * step.each);
  write.num_heads = step.settings.num_heads;
  kernels::rope_kv_write_async(write, step.stream, false);
  for (std::int64_t b = 0; b < step.batch; b++) {
    auto args = step.arguments<kernels::PrefillAttentionArgs>(b);
    args.q = step.queries + static_cast<std::size_t>(b * step.each) * step.q_width();
    args.starts = step.lists.starts + 2 * b;
    args.max_tokens = static_cast<int>(step.each);
    kernels::prefill_attention_async(args, step.stream, false);
  }
}

}  // namespace

void attention_async(const AttentionStep& step) {
  if (step.masks) return tree_async(step);
  if (step.each == 1) return decode_async(step);
  prompt_async(step);
}

}  // namespace edgellm::plugins
