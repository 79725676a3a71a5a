// Contexts of an engine: what each is bound to, when they are made, and when they go.
#include <algorithm>

#include "edgellm/cuda_try.hpp"
#include "edgellm/trt_decoder.hpp"

namespace edgellm {
namespace {

// Each context takes some memory of TensorRT's own, each graph some of the driver's. They are made when a combination
// of slots is first seen; beyond this many all are dropped.
constexpr std::size_t kMostContexts = 64;
constexpr std::size_t kMostGraphs = 128;

}  // namespace

void TrtDecoder::forget(int adapter) {
  stream_.wait();
  std::erase_if(contexts_, [&](const auto& entry) { return adapter < 0 || entry.first.adapter == adapter; });
  std::erase_if(graphs_, [&](const auto& entry) {
    const Layout& groups = layout(entry.first);
    return adapter < 0 ||
           std::any_of(groups.begin(), groups.end(), [&](const Group& group) { return group.adapter == adapter; });
  });
}

TrtDecoder::Inputs TrtDecoder::group_inputs(int first_slot) const {
  const auto slot = static_cast<std::size_t>(first_slot);
  const auto rows = static_cast<std::size_t>(trt_.rows_per_group());
  const std::size_t ints = slot * trt_stride(rows * sizeof(std::int64_t));
  const auto at = [&](const char* name) { return reinterpret_cast<std::int64_t*>(arena_.get<std::byte>(name) + ints); };
  Inputs inputs;
  inputs.each.embeds =
      arena_.get<std::byte>("trt.embeds") + slot * trt_stride(rows * static_cast<std::size_t>(config_.hidden_size) * 2);
  inputs.each.positions = at("trt.positions");
  inputs.each.write_indices = at("trt.write_indices");
  inputs.each.logit_indices = at("trt.logit_indices");
  if (arena_.plan().contains("trt.tree_masks")) inputs.each.tree_masks = at("trt.tree_masks");
  inputs.each.is_bf16 = trt_.is_bf16;
  const std::size_t mask = slot * trt_stride(rows * static_cast<std::size_t>(trt_.engine_capacity) * 2);
  for (const int window : windows_) {
    inputs.masks.push_back(arena_.get<std::byte>("trt.mask." + std::to_string(window)) + mask);
  }
  return inputs;
}

TrtDecoder::Inputs TrtDecoder::chunk_inputs() const {
  Inputs inputs;
  inputs.each.embeds = arena_.get<std::byte>("trt.chunk_embeds");
  inputs.each.positions = arena_.get<std::int64_t>("trt.chunk_positions");
  inputs.each.write_indices = arena_.get<std::int64_t>("trt.chunk_write_indices");
  inputs.each.logit_indices = arena_.get<std::int64_t>("trt.chunk_logit_indices");
  if (arena_.plan().contains("trt.chunk_tree_masks")) {
    inputs.each.tree_masks = arena_.get<std::int64_t>("trt.chunk_tree_masks");
  }
  inputs.each.is_bf16 = trt_.is_bf16;
  for (const int window : windows_) {
    inputs.masks.push_back(arena_.get<std::byte>("trt.chunk_mask." + std::to_string(window)));
  }
  return inputs;
}

void TrtDecoder::record_masks_async(const Inputs& inputs, int num_tokens, const VerifyInputs* tree) {
  kernels::EngineMaskArgs args;
  args.positions = inputs.each.positions;
  args.num_tokens = num_tokens;
  args.capacity = trt_.engine_capacity;
  args.tree = tree != nullptr ? tree->masks : nullptr;
  args.start = tree != nullptr ? &tree->position : nullptr;
  args.is_bf16 = inputs.each.is_bf16;
  for (std::size_t i = 0; i < windows_.size(); ++i) {
    args.window = windows_[i];
    args.mask = inputs.masks[i];
    kernels::engine_mask_async(args, stream_.get());
  }
}

float* TrtDecoder::group_logits(int first_slot) const {
  return reinterpret_cast<float*>(arena_.get<std::byte>("trt.logits") +
                                  static_cast<std::size_t>(first_slot) *
                                      trt_stride(static_cast<std::size_t>(config_.num_rows()) * sizeof(float)));
}

void TrtDecoder::bind(TrtContext& context, const Inputs& inputs, float* logits, const ContextKey& key, int length) {
  std::size_t mask = 0;
  for (std::size_t i = 0; i < trt_.tensors.size(); ++i) {
    const TrtTensor& tensor = trt_.tensors[i];
    std::vector<std::int64_t> dims = tensor.dims;
    switch (tensor.role) {
      case TrtRole::embeds:
        dims[0] = key.num_rows;
        dims[1] = length;
        context.set_address(tensor.name, inputs.each.embeds);
        break;
      case TrtRole::positions:
        dims = {key.num_rows, length};
        context.set_address(tensor.name, inputs.each.positions);
        break;
      case TrtRole::write_indices:
        dims = {key.num_rows};
        context.set_address(tensor.name, inputs.each.write_indices);
        break;
      case TrtRole::logit_indices:
        dims = {key.num_logits};
        context.set_address(tensor.name, inputs.each.logit_indices);
        break;
      case TrtRole::logits:
        context.set_address(tensor.name, logits);
        continue;  // outputs have no shape of their own
      case TrtRole::past_key:
      case TrtRole::past_value:
        dims[0] = key.num_rows;
        context.set_address(tensor.name,
                            cache_.tensor(tensor.layer, tensor.role == TrtRole::past_value ? 1 : 0, key.first_slot));
        break;
      case TrtRole::present_key:
      case TrtRole::present_value:  // written in place
        context.set_address(tensor.name,
                            cache_.tensor(tensor.layer, tensor.role == TrtRole::present_value ? 1 : 0, key.first_slot));
        continue;
      case TrtRole::past_kv:
        dims[0] = key.num_rows;
        context.set_address(tensor.name, cache_.tensor(tensor.layer, 0, key.first_slot));
        break;
      case TrtRole::present_kv:
        context.set_address(tensor.name, cache_.tensor(tensor.layer, 0, key.first_slot));
        continue;
      case TrtRole::mask:
        dims = {key.num_rows, 1, length, trt_.engine_capacity};
        context.set_address(tensor.name, inputs.masks[mask++]);
        break;
      case TrtRole::tree_masks:
        dims = {key.num_rows, length};
        context.set_address(tensor.name, inputs.each.tree_masks);
        break;
      case TrtRole::lora_a:
        dims[1] = lora_rank(key.adapter, tensor);
        context.set_address(tensor.name, lora_address(key.adapter, i));
        break;
      case TrtRole::lora_b:
        dims[0] = lora_rank(key.adapter, tensor);
        context.set_address(tensor.name, lora_address(key.adapter, i));
        break;
    }
    context.set_shape(tensor.name, dims);
  }
}

TrtContext TrtDecoder::make_context(const ContextKey& key) {
  // TensorRT's manual wants a context for each captured graph, for a graph holds the context's state; all of them may
  // share their memory, for one stream runs them.
  TrtContext context = engine_.make_context(arena_.get<std::byte>("trt.context"));
  context.use_profile_async(0, stream_.get());
  if (key.length > 1) {
    bind(context, chunk_inputs(), arena_.get<float>("logits"), key, key.length);
  } else {
    bind(context, group_inputs(key.first_slot), group_logits(key.first_slot), key, 1);
  }
  return context;
}

void TrtDecoder::prepare_capture_async(const StepKey& key) {
  const Layout groups = layout(key);
  if (contexts_.size() + groups.size() > kMostContexts || graphs_.size() >= kMostGraphs) forget(-1);
  if (key.tail == StepTail::kVerify) {
    const ContextKey needed = verify_context_key(key);
    if (contexts_.contains(needed)) return;
    contexts_.emplace(needed, make_context(needed));
    record_verify_async(key);  // see below
    return;
  }
  for (const Group& group : groups) {
    if (contexts_.contains(context_key(group))) continue;
    contexts_.emplace(context_key(group), make_context(context_key(group)));
    // After a change of shapes TensorRT sets itself up in the next enqueue, which cannot be captured. What this one
    // writes, the captured one writes again.
    record_group_async(group, key.batch);
  }
}

}  // namespace edgellm
