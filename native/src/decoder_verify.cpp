// Verifying a draft: a chain's or a tree's nodes as one graph, with logits of every node. Few go through the decode
// kernels, more through a prompt's products with attention of trees between them.
#include <algorithm>
#include <array>
#include <stdexcept>
#include <string>

#include "edgellm/cuda_try.hpp"
#include "edgellm/decoder.hpp"
#include "edgellm/kernels/attention_decode.hpp"
#include "edgellm/kernels/attention_tree.hpp"
#include "edgellm/kernels/embedding.hpp"
#include "edgellm/kernels/rms_norm.hpp"
#include "edgellm/kernels/widen.hpp"
#include "edgellm/verify_inputs.hpp"
#include "guarded.hpp"

namespace edgellm {
bool Decoder::verifies(const SequenceStep& item) const {
  const auto length = static_cast<int>(item.token_ids.size());
  return length > 1 && length <= std::min(config_.max_verify_tokens, kernels::kMaxGemvTokens) &&
         item.num_logits == length;
}

StepKey Decoder::prepare_verify_async(int slot, int position, std::span<const std::int32_t> token_ids,
                                      std::span<const std::int32_t> parents, int adapter) {
  const auto count = static_cast<int>(token_ids.size());
  upload_verify_inputs_async(draft_inputs(slot, position, token_ids, parents));
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
  EDGELLM_CUDA_TRY(cudaMemcpyAsync(host_logits_->as<float>() + static_cast<std::size_t>(first_row) * vocab,
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

bool Decoder::multiplies_draft(const StepKey& key) const {
  return key.tail == StepTail::kVerify && key.adapted == 0 && key.batch > kMaxBatch &&
         key.batch <= most_multiplied_nodes_;
}

void Decoder::record_draft_products_async(const StepKey& key) {
  const int count = key.batch;
  cudaStream_t stream = stream_.get();
  auto* residual = arena_.get<float>("residual");
  auto* residual_bf16 = arena_.get<__nv_bfloat16>("residual_bf16");
  auto* normed = arena_.get<__nv_bfloat16>("normed");
  auto* narrow_qkv = arena_.get<__nv_bfloat16>("gate_up");  // which is free until after attention
  kernels::embedding_async(weights_.embedding(), arena_.get<VerifyInputs>("verify_inputs")->token_ids, count,
                           config_.embed_scale, residual, residual_bf16, stream, false);
  kernels::rms_norm_async(residual, weights_.layer(0).input_norm, config_.rms_norm_eps, count, config_.hidden_size,
                          normed, stream, pdl_);
  for (int index = 0; index < config_.num_layers; ++index) {
    const bool pdl = prompt_product_async(index, Linear::kQkv, normed, narrow_qkv, count, 0);
    kernels::widen_async(narrow_qkv, weights_.layer(index).qkv.bias, arena_.get<float>("qkv"), count,
                         config_.qkv_width(), stream, pdl);
    record_verify_attention_async(index, key, pdl_);
    after_attention_async(index, 0, count, true, 0);
  }
  if (multiplies_head(count)) return head_product_async(count);
  record_head_async(count, residual_bf16, residual, false, pdl_);
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
  args.workspace = arena_.get<std::byte>("attention");
  for (const bool writes_only : {true, false}) {
    args.window = writes_only ? 1 : config_.window(layer);
    args.most_attended = args.window > 0 ? std::min(config_.capacity, args.window) : config_.capacity;
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
    if (args.x_f32 != nullptr) args.x_f32 += done * cols;
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
      // A tree's graph serves chains too where they need no exactness. Of two nodes all but roots are a chain.
      const auto nodes = std::span(zeros).first(static_cast<std::size_t>(num_nodes));
      const std::vector<std::int32_t> roots(nodes.size(), -1);
      const StepKey key = prepare_verify_async(
          0, 0, nodes, chain ? std::span<const std::int32_t>() : std::span<const std::int32_t>(roots), 0);
      record_step_async(key);  // first without a graph: CUDA must not load code inside a capture
      if (multiplies_draft(key) && config_.max_adapters > 0) {
        // With an adapter it has other kernels, and their graph is captured when one is loaded.
        upload_adapters_async(std::array<std::int32_t, kMaxVerifyTokens>{});
        record_step_async({key.batch, key.tail, (1U << kNumLinears) - 1});
      }
      stream_.wait();
      inputs_used_ = 0;
      (void)graph(key);
    }
  }
  upload_verify_inputs_async({});  // a path of no nodes
  cache_.keep_path_async(*arena_.get<VerifyInputs>("verify_inputs"), stream_.get());
  stream_.wait();
  inputs_used_ = 0;
}

std::vector<float> Decoder::time_verify(int slot, int position, int num_tokens, int num_steps) {
  if (slot < 0 || slot >= config_.num_slots || position < 0 || num_tokens < 1 ||
      num_tokens > config_.max_verify_tokens || position > config_.capacity - num_tokens) {
    throw std::invalid_argument("a draft does not fit its slot or max_verify_tokens");
  }
  if (num_steps < 1) throw std::invalid_argument("num_steps " + std::to_string(num_steps) + " is not at least 1");
  return guarded([&] {
    end_run();
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
