// What an engine's decode loop may hold, and where: every byte beside TensorRT's own.
#include <algorithm>
#include <array>
#include <stdexcept>

#include "config_check.hpp"
#include "edgellm/trt_decoder.hpp"

namespace edgellm {
namespace {

constexpr std::size_t kEngineGraphBytes = std::size_t{64} << 20;  // of captured engines, which nothing has measured

}  // namespace

TrtRole trt_role_from_name(const std::string& name) {
  constexpr std::array kNames = {"embeds",   "positions",  "write_indices", "logit_indices", "logits",
                                 "past_key", "past_value", "present_key",   "present_value", "lora_a",
                                 "lora_b",   "past_kv",    "present_kv",    "mask",          "tree_masks"};
  const auto found = std::find(kNames.begin(), kNames.end(), name);
  if (found == kNames.end()) throw std::invalid_argument("no tensor of an engine has the role " + name);
  return static_cast<TrtRole>(found - kNames.begin());
}

void TrtDecoderConfig::check() const {
  require(loop.num_slots > 0 && loop.capacity > 0 && max_batch > 0 && decode_tokens > 0 && max_logits > 0,
          "a size of the engine is zero");
  const auto own = is_bf16 ? kernels::KvFormat::bf16 : kernels::KvFormat::fp16;
  require(loop.kv_format == own || (loop.kv_format == kernels::KvFormat::fp8 && has(TrtRole::past_kv)),
          "an engine's cache is what it computes in, fp16 or bf16, or fp8 with plugins");
  require(loop.max_tokens >= decode_tokens, "the engine's prefill takes fewer tokens than its decode step");
  require(loop.embedding_format == kernels::WeightFormat::bf16 ||
              loop.embedding_format == kernels::WeightFormat::fp16 ||
              loop.embedding_format == kernels::WeightFormat::int8,
          "the embedding must be bf16, fp16 or int8");
  require(loop.embedding_format != kernels::WeightFormat::int8 ||
              (loop.group_size > 0 && loop.hidden_size % loop.group_size == 0),
          "an embedding of " + std::to_string(loop.hidden_size) + " columns has no groups of " +
              std::to_string(loop.group_size));
  require(loop.max_verify_tokens == 0 || has(TrtRole::mask) || has(TrtRole::tree_masks),
          "the engine has no masks as inputs, so it takes no trees; build it with --trees");
  require(loop.max_verify_tokens >= 0 && loop.max_verify_tokens <= kMaxVerifyTokens &&
              loop.max_verify_tokens <= std::min(decode_tokens, max_logits),
          "trees of " + std::to_string(loop.max_verify_tokens) + " nodes exceed the " +
              std::to_string(std::min({decode_tokens, max_logits, kMaxVerifyTokens})) +
              " tokens that a decode step of the engine takes; build it with a larger --max-verify, at most " +
              std::to_string(kMaxVerifyTokens));
  const int reserved = rows_per_group() > 1 ? 1 : 0;
  require(loop.capacity + reserved <= engine_capacity,
          "slots hold " + std::to_string(loop.capacity) + " tokens and the engine's cache " +
              std::to_string(engine_capacity) + (reserved > 0 ? ", whose last place is for idle slots" : ""));
  const std::size_t slot_bytes = static_cast<std::size_t>(loop.num_kv_heads) * static_cast<std::size_t>(loop.head_dim) *
                                 static_cast<std::size_t>(engine_capacity) * kernels::kv_element_bytes(loop.kv_format);
  require(loop.num_slots == 1 || slot_bytes % MemoryPlan::kAlignment == 0,
          "a slot of " + std::to_string(engine_capacity) + " tokens has " + std::to_string(slot_bytes) +
              " bytes of keys in a layer, and TensorRT wants addresses in multiples of 256; build the engine with a "
              "--max-context that is a multiple of 64, or use one slot");
}

bool TrtDecoderConfig::has(TrtRole role) const {
  return std::any_of(tensors.begin(), tensors.end(), [&](const TrtTensor& tensor) { return tensor.role == role; });
}

KvOrder TrtDecoderConfig::kv_order() const { return has(TrtRole::past_kv) ? KvOrder::together : KvOrder::apart; }

std::vector<int> TrtDecoderConfig::mask_windows() const {
  std::vector<int> windows;
  for (const TrtTensor& tensor : tensors) {
    if (tensor.role == TrtRole::mask) windows.push_back(tensor.window);
  }
  return windows;
}

int TrtDecoderConfig::rows_per_group() const { return std::min(max_batch, loop.num_slots); }

std::size_t TrtDecoderConfig::adapter_bytes() const {
  std::size_t bytes = 0;
  for (const TrtTensor& tensor : tensors) {
    if (tensor.role != TrtRole::lora_a && tensor.role != TrtRole::lora_b) continue;
    std::size_t count = static_cast<std::size_t>(tensor.max_rank);
    for (const std::int64_t size : tensor.dims) count *= size < 0 ? 1 : static_cast<std::size_t>(size);
    bytes += trt_stride(count * 2);
  }
  return bytes;
}

MemoryPlan plan_trt_memory(const TrtDecoderConfig& config, std::size_t context_bytes) {
  config.check();
  const DecoderConfig& loop = config.loop;
  MemoryPlan plan;
  const auto hidden = static_cast<std::size_t>(loop.hidden_size);
  const auto slots = static_cast<std::size_t>(loop.num_slots);
  const auto rows = static_cast<std::size_t>(config.rows_per_group());
  const auto tokens = static_cast<std::size_t>(loop.max_tokens);
  const std::size_t table = static_cast<std::size_t>(loop.vocab_size) * hidden;
  const bool int8 = loop.embedding_format == kernels::WeightFormat::int8;
  plan.add("weights", "embed.weight", table * (int8 ? 1 : 2));
  if (int8) plan.add("weights", "embed.scale", table / static_cast<std::size_t>(loop.group_size) * 2);
  if (loop.head_rows > 0) {
    plan.add("weights", "vocab_map", static_cast<std::size_t>(loop.head_rows) * sizeof(std::int32_t));
  }
  plan.add("kv_cache", "kv", slots * static_cast<std::size_t>(config.engine_capacity) * loop.kv_bytes_per_token());
  plan.add("context", "trt.context", context_bytes);
  plan_token_loop(plan, loop, std::max(tokens, std::size_t{kMaxBatch}),
                  static_cast<std::size_t>(std::max(config.max_logits, kMaxBatch)));
  // Of each slot as the first of a group.
  for (const char* name : {"trt.positions", "trt.write_indices", "trt.logit_indices"}) {
    plan.add("workspace", name, slots * trt_stride(rows * sizeof(std::int64_t)));
  }
  plan.add("workspace", "trt.embeds", slots * trt_stride(rows * hidden * 2));
  plan.add("logits", "trt.logits", slots * trt_stride(static_cast<std::size_t>(loop.num_rows()) * sizeof(float)));
  // Of several tokens of one sequence.
  plan.add("workspace", "trt.tokens", tokens * sizeof(std::int32_t));
  plan.add("workspace", "trt.chunk_positions", tokens * sizeof(std::int64_t));
  plan.add("workspace", "trt.chunk_write_indices", sizeof(std::int64_t));
  plan.add("workspace", "trt.chunk_logit_indices", static_cast<std::size_t>(config.max_logits) * sizeof(std::int64_t));
  plan.add("workspace", "trt.chunk_embeds", tokens * hidden * 2);
  if (config.has(TrtRole::tree_masks)) {
    plan.add("workspace", "trt.tree_masks", slots * trt_stride(rows * sizeof(std::int64_t)));
    plan.add("workspace", "trt.chunk_tree_masks", tokens * sizeof(std::int64_t));
  }
  for (const int window : config.mask_windows()) {
    const std::size_t row = static_cast<std::size_t>(config.engine_capacity) * 2;
    plan.add("workspace", "trt.mask." + std::to_string(window), slots * trt_stride(rows * row));
    plan.add("workspace", "trt.chunk_mask." + std::to_string(window), tokens * row);
  }
  plan.add("workspace", "verify_inputs", sizeof(VerifyInputs));
  const std::size_t adapters = static_cast<std::size_t>(loop.max_adapters) * config.adapter_bytes();
  if (config.has(TrtRole::lora_a)) {
    // Behind the adapters, what an empty tensor is bound to: TensorRT wants an address of every input.
    plan.add("adapters", "trt.lora", adapters + MemoryPlan::kAlignment);
  }
  plan.set_aside(kEngineGraphBytes);
  return plan;
}

}  // namespace edgellm
