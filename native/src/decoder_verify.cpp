// Verifying a draft: a chain's or a tree's nodes through the decode kernels as one graph, logits of every node, and
// the accepted path made linear.
#include <algorithm>
#include <array>
#include <cstring>
#include <stdexcept>
#include <string>

#include "edgellm/cuda_try.hpp"
#include "edgellm/decoder.hpp"
#include "edgellm/kernels/attention_decode.hpp"
#include "edgellm/kernels/attention_tree.hpp"
#include "edgellm/kernels/kv_compact.hpp"
#include "edgellm/verify_inputs.hpp"
#include "guarded.hpp"

namespace edgellm {
namespace {

// Node i of a tree after the node before it, or of a chain.
int parent_of(std::span<const std::int32_t> parents, int node) {
  return parents.empty() ? node - 1 : parents[static_cast<std::size_t>(node)];
}

bool is_chain(std::span<const std::int32_t> parents) {
  for (std::size_t i = 0; i < parents.size(); ++i) {
    if (parents[i] != static_cast<std::int32_t>(i) - 1) return false;
  }
  return true;
}

}  // namespace

bool Decoder::verifies(const SequenceStep& item) const {
  const auto length = static_cast<int>(item.token_ids.size());
  return length > 1 && length <= std::min(config_.max_verify_tokens, kernels::kMaxGemvTokens) &&
         item.num_logits == length;
}

void Decoder::upload_verify_inputs_async(const VerifyInputs& inputs) {
  std::int32_t* host = take_inputs(sizeof(VerifyInputs) / sizeof(std::int32_t));
  std::memcpy(host, &inputs, sizeof inputs);  // its place may not be aligned for the masks
  EDGELLM_CUDA_TRY(cudaMemcpyAsync(arena_.get<std::byte>("verify_inputs"), host, sizeof inputs, cudaMemcpyHostToDevice,
                                   stream_.get()));
}

StepKey Decoder::prepare_verify_async(int slot, int position, std::span<const std::int32_t> token_ids,
                                      std::span<const std::int32_t> parents, int adapter) {
  const auto count = static_cast<int>(token_ids.size());
  VerifyInputs inputs{};
  std::fill_n(inputs.positions, kMaxVerifyTokens, -1);
  for (int i = 0; i < count; ++i) {
    const int parent = parent_of(parents, i);
    inputs.token_ids[i] = token_ids[static_cast<std::size_t>(i)];
    inputs.positions[i] = position + i;
    inputs.slots[i] = slot;
    inputs.depths[i] = parent < 0 ? 0 : inputs.depths[parent] + 1;
    inputs.masks[i] = (parent < 0 ? 0 : inputs.masks[parent]) | std::uint64_t{1} << i;
  }
  inputs.starts[1] = count;
  inputs.slot = slot;
  inputs.position = position;
  upload_verify_inputs_async(inputs);
  std::array<std::int32_t, kMaxVerifyTokens> adapters;
  adapters.fill(adapter);
  const unsigned adapted = adapted_linears(adapters);
  if (adapted != 0) upload_adapters_async(adapters);
  const bool exact = config_.batch_invariant && count <= kernels::kMaxGemvTokens && is_chain(parents);
  return {verify_class(count), exact ? StepTail::kVerifyExactly : StepTail::kVerify, adapted};
}

void Decoder::verify_async(int slot, int position, std::span<const std::int32_t> token_ids,
                           std::span<const std::int32_t> parents, int first_row, int adapter) {
  run_step_async(prepare_verify_async(slot, position, token_ids, parents, adapter));
  const auto vocab = static_cast<std::size_t>(config_.num_rows());
  EDGELLM_CUDA_TRY(cudaMemcpyAsync(host_logits_.as<float>() + static_cast<std::size_t>(first_row) * vocab,
                                   arena_.get<float>("logits"), token_ids.size() * vocab * sizeof(float),
                                   cudaMemcpyDeviceToHost, stream_.get()));
}

void Decoder::record_verify_attention_async(int layer, const StepKey& key, bool pdl) {
  if (key.tail == StepTail::kVerifyExactly) return record_exact_chain_attention_async(layer, key.batch, pdl);
  const auto* inputs = arena_.get<VerifyInputs>("verify_inputs");
  kernels::TreeAttentionArgs tree;
  tree.qkv = arena_.get<float>("qkv");
  tree.kv = cache_.layer(layer);
  tree.rope = weights_.layer(layer).rope;
  tree.starts = inputs->starts;
  tree.slots = &inputs->slot;
  tree.positions = &inputs->position;
  tree.depths = inputs->depths;
  tree.masks = inputs->masks;
  tree.out = arena_.get<__nv_bfloat16>("attended");
  tree.max_tokens = key.batch;
  tree.num_heads = config_.num_heads;
  tree.window = config_.window(layer);
  tree.scale = attention_scale(config_);
  tree.workspace = arena_.get<std::byte>("tree_attention");
  kernels::tree_attention_async(tree, stream_.get(), pdl);
}

// The bits of single steps need the decode kernel itself, whose sums have another order than tensor cores'. The chain's
// tokens are its sequences, all in one slot, each behind the others: a first pass, whose window is the token itself,
// only writes keys and values. The second finds them in the cache (and writes the same again).
void Decoder::record_exact_chain_attention_async(int layer, int count, bool pdl) {
  const auto* inputs = arena_.get<VerifyInputs>("verify_inputs");
  const auto qkv_width = static_cast<std::size_t>(config_.qkv_width());
  const auto out_width = static_cast<std::size_t>(config_.q_width());
  kernels::DecodeAttentionArgs args;
  args.kv = cache_.layer(layer);
  args.rope = weights_.layer(layer).rope;
  args.num_heads = config_.num_heads;
  args.scale = attention_scale(config_);
  args.most_splits = most_splits_;
  args.launched_splits = longest_splits_;
  args.workspace = arena_.get<std::byte>("attention");
  for (const bool writes_only : {true, false}) {
    args.window = writes_only ? 1 : config_.window(layer);
    for (int first = 0; first < count; first += kMaxBatch) {
      const auto row = static_cast<std::size_t>(first);
      args.qkv = arena_.get<float>("qkv") + row * qkv_width;
      args.out = arena_.get<__nv_bfloat16>("attended") + row * out_width;
      args.slots = inputs->slots + first;
      args.positions = inputs->positions + first;
      args.batch = std::min(kMaxBatch, count - first);
      // With pdl the second pass would fetch keys before the first has written them.
      kernels::decode_attention_async(args, stream_.get(), pdl && writes_only);
    }
  }
}

void Decoder::decode_product_async(kernels::GemvArgs args, bool pdl) {
  const auto cols = static_cast<std::size_t>(args.weight.cols);
  const auto width =
      static_cast<std::size_t>(kernels::has_pairs(args.epilogue) ? args.weight.rows / 2 : args.weight.rows);
  for (int left = args.num_tokens; left > 0; left -= kernels::kMaxGemvTokens) {
    args.num_tokens = std::min(left, kernels::kMaxGemvTokens);
    if (args.lora.linears != nullptr) {
      adapt_async(args, pdl);
      pdl = pdl_;
    }
    kernels::gemv_async(args, stream_.get(), pdl);
    pdl = pdl_;
    const auto done = static_cast<std::size_t>(args.num_tokens);
    args.x += done * cols;
    if (args.out_f32 != nullptr) args.out_f32 += done * width;
    if (args.out_bf16 != nullptr) args.out_bf16 += done * width;
    if (args.lora.linears != nullptr) args.lora.adapters += done;
  }
}

void Decoder::warm_up_verify() {
  const std::vector<std::int32_t> zeros(kMaxVerifyTokens, 0);
  for (int count = 2; count <= verify_class(config_.max_verify_tokens); count *= 2) {
    // The class's graph, with as many nodes as a slot holds.
    const int num_nodes = std::min(count, config_.capacity);
    if (verify_class(num_nodes) < count) break;
    for (const bool chain : {true, false}) {
      // A star's graph serves chains too where they need no exactness.
      const auto nodes = std::span(zeros).first(static_cast<std::size_t>(num_nodes));
      std::vector<std::int32_t> star(nodes.begin(), nodes.end());
      star[0] = -1;
      const StepKey key = prepare_verify_async(
          0, 0, nodes, chain ? std::span<const std::int32_t>() : std::span<const std::int32_t>(star), 0);
      record_step_async(key);  // first without a graph: CUDA must not load code inside a capture
      stream_.wait();
      inputs_used_ = 0;
      (void)graph(key);
    }
  }
}

int Decoder::verify_tree(int slot, int position, std::span<const std::int32_t> token_ids,
                         std::span<const std::int32_t> parents, int adapter) {
  const auto count = static_cast<int>(token_ids.size());
  if (count < 1 || count > config_.max_verify_tokens) {
    throw std::invalid_argument("a draft of " + std::to_string(count) + " nodes exceeds max_verify_tokens " +
                                std::to_string(config_.max_verify_tokens) + ", or is empty");
  }
  if (slot < 0 || slot >= config_.num_slots || position < 0 || position + count > config_.capacity) {
    throw std::invalid_argument("a draft does not fit its slot: every node needs a place behind the prefix");
  }
  if (!parents.empty() && parents.size() != token_ids.size()) {
    throw std::invalid_argument("a draft has one parent a node");
  }
  for (int i = 0; i < count; ++i) {
    const int parent = parent_of(parents, i);
    if (parent < -1 || parent >= i) {
      throw std::invalid_argument("node " + std::to_string(i) + " has parent " + std::to_string(parent) +
                                  "; parents come before their children, and a root has -1");
    }
  }
  adapters_.check(adapter);
  return guarded([&] {
    end_run();
    inputs_used_ = 0;
    verify_async(slot, position, token_ids, parents, 0, adapter);
    stream_.wait();
    return count;
  });
}

void Decoder::accept_path(int slot, int position, std::span<const std::int32_t> nodes) {
  const auto count = static_cast<int>(nodes.size());
  if (slot < 0 || slot >= config_.num_slots || position < 0 || count > config_.max_verify_tokens) {
    throw std::invalid_argument("a path does not fit its slot");
  }
  bool moves = false;
  for (int i = 0; i < count; ++i) {
    const int node = nodes[static_cast<std::size_t>(i)];
    if (node < 0 || position + node >= config_.capacity || (i > 0 && node <= nodes[static_cast<std::size_t>(i) - 1])) {
      throw std::invalid_argument("a path's nodes ascend and lie in the slot, but number " + std::to_string(i) +
                                  " is node " + std::to_string(node));
    }
    moves |= node != i;
  }
  if (!moves) return;
  guarded([&] {
    wait_for_run();
    inputs_used_ = 0;
    VerifyInputs path{};
    std::copy(nodes.begin(), nodes.end(), path.token_ids);
    path.starts[0] = count;
    path.slot = slot;
    path.position = position;
    upload_verify_inputs_async(path);
    const auto* inputs = arena_.get<VerifyInputs>("verify_inputs");
    const kernels::KvLayer cache = cache_.layer(0);
    kernels::KvCompactArgs args;
    args.cache = cache.data;
    args.format = cache.format;
    args.num_layers = config_.num_layers;
    args.num_slots = config_.num_slots;
    args.num_kv_heads = cache.num_kv_heads;
    args.capacity = cache.capacity;
    args.head_dim = cache.head_dim;
    args.slots = &inputs->slot;
    args.positions = &inputs->position;
    args.paths = inputs->token_ids;
    args.counts = inputs->starts;
    args.max_nodes = kMaxVerifyTokens;
    kernels::kv_compact_async(args, stream_.get(), false);
    stream_.wait();  // the pinned inputs are the next call's
  });
}

std::vector<float> Decoder::time_verify(int slot, int position, int num_tokens, int num_steps) {
  if (slot < 0 || slot >= config_.num_slots || position < 0 || position + num_tokens > config_.capacity ||
      num_tokens < 1 || num_tokens > config_.max_verify_tokens) {
    throw std::invalid_argument("a draft does not fit its slot or max_verify_tokens");
  }
  return guarded([&] {
    stream_.wait();
    inputs_used_ = 0;
    const std::vector<std::int32_t> tokens(static_cast<std::size_t>(num_tokens), 7);
    const StepKey key = prepare_verify_async(slot, position, tokens, {}, 0);
    std::vector<Event> marks;
    for (int i = 0; i <= num_steps; ++i) marks.emplace_back(true);
    marks.front().record(stream_.get());
    for (int i = 0; i < num_steps; ++i) {
      run_step_async(key);
      marks[static_cast<std::size_t>(i) + 1].record(stream_.get());
    }
    stream_.wait();
    std::vector<float> times;
    for (int i = 0; i < num_steps; ++i) {
      times.push_back(marks[static_cast<std::size_t>(i) + 1].elapsed_ms(marks[static_cast<std::size_t>(i)]));
    }
    return times;
  });
}

}  // namespace edgellm
