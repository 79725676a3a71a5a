#include "edgellm/decoder_config.hpp"

#include <algorithm>
#include <set>

#include "config_check.hpp"
#include "edgellm/adapters.hpp"
#include "edgellm/cublaslt.hpp"
#include "edgellm/kernels/attention_decode.hpp"
#include "edgellm/kernels/attention_tree.hpp"
#include "edgellm/kernels/gemv.hpp"
#include "edgellm/kernels/quantized.hpp"
#include "edgellm/run.hpp"
#include "edgellm/verify_inputs.hpp"

namespace edgellm {
namespace {

using kernels::WeightFormat;

constexpr std::size_t kStagingBytes = std::size_t{32} << 20;  // weights on their way to another format

// Copies are made of a prompt's weights, and multiplied. HBM is fast enough that how many they are matters more than
// where they are (an H200); elsewhere they should stay in the L2 cache.
constexpr int kHbmBits = 2048;
constexpr std::size_t kCopiedBytesOfHbm = std::size_t{256} << 20;

// With so small an L2 cache copies are read from memory whatever their size, eight times the bytes of a weight in int4
// in all. Orin has 4 MB, RTX 30 and A10 have 6.
constexpr int kSmallL2Bytes = 16 << 20;
constexpr std::size_t kUncachedBytes = std::size_t{64} << 20;

constexpr int kMaxPackedTokens = 128;  // elsewhere: with more, a copy in parts of 64 MB was faster on an H200

void plan_linear(MemoryPlan& plan, const std::string& name, int rows, int cols, const FormatAndGroup& stored) {
  const auto& [format, group] = stored;
  const std::size_t count = static_cast<std::size_t>(rows) * static_cast<std::size_t>(cols);
  switch (format) {
    case WeightFormat::bf16:
    case WeightFormat::fp16:
      plan.add("weights", name + ".weight", count * 2);
      break;
    case WeightFormat::fp8:
      plan.add("weights", name + ".weight", count);
      plan.add("weights", name + ".scale", static_cast<std::size_t>(rows) * sizeof(float));
      break;
    case WeightFormat::int8:
      plan.add("weights", name + ".weight", count);
      plan.add("weights", name + ".scale", count / static_cast<std::size_t>(group) * 2);
      break;
    case WeightFormat::int8_offset:  // two fp16 a group
    case WeightFormat::fp8_blocks:   // a float
      plan.add("weights", name + ".weight", count);
      plan.add("weights", name + ".scale", count / static_cast<std::size_t>(group) * 4);
      break;
    case WeightFormat::int4:
      plan.add("weights", name + ".weight", kernels::int4_packed_data_bytes(rows, cols));
      plan.add("weights", name + ".scale", kernels::int4_packed_scales_bytes(rows, cols, group));
      break;
  }
}

void plan_input_map(MemoryPlan& plan, const DecoderConfig& config, const std::string& stem, int cols) {
  const auto count = static_cast<std::size_t>(cols);
  if (config.ordered.contains(stem)) {
    plan.add("weights", stem + ".input_order", count * sizeof(std::int32_t));
    if (follows_norm(stem)) plan.add("weights", stem + ".ordered_gain", count * 2);
  }
  if (config.factored.contains(stem)) plan.add("weights", stem + ".input_factor", count * sizeof(float));
}

// Scratch that loading and prefill share: a quantised weight as the file has it, or a layer's as it is copied.
std::size_t scratch_bytes(const DecoderConfig& config) {
  std::size_t bytes = kStagingBytes;
  const auto stage = [&](int rows, int cols, const FormatAndGroup& stored) {
    const auto& [format, group] = stored;
    if (format != WeightFormat::int4) return;
    const std::size_t count = static_cast<std::size_t>(rows) * static_cast<std::size_t>(cols);
    const std::size_t scales = count / static_cast<std::size_t>(group) * 2;
    bytes = std::max(bytes, count / 2 + scales + 2 * MemoryPlan::kAlignment);
  };
  for (int layer = 0; layer < config.num_layers; ++layer) {
    for (const LinearShape& linear : layer_linears(config)) {
      const FormatAndGroup stored = config.format_of(layer, linear.stem);
      stage(linear.rows, linear.cols, stored);
      if (!config.copies(stored.first)) continue;
      const int part = config.copied_rows(stored.first, linear.rows, linear.cols);
      bytes = std::max(bytes, static_cast<std::size_t>(part) * static_cast<std::size_t>(linear.cols) * 2);
    }
  }
  stage(config.num_rows(), config.hidden_size, config.format_of("head"));
  return bytes;
}

// For every second part of what prefill dequantises in parts, so that two are under way; 0 when nothing is cut. Where
// fp8 weights are multiplied as they are, only prompts with an adapter dequantise them, and alone they have none.
std::size_t side_scratch_bytes(const DecoderConfig& config) {
  std::size_t bytes = 0;
  bool needed = false;
  for (const LinearShape& linear : layer_linears(config)) {
    for (int layer = 0; layer < config.num_layers; ++layer) {
      const WeightFormat format = config.format_of(layer, linear.stem).first;
      const int part = config.copied_rows(format, linear.rows, linear.cols);
      if (!config.copies(format) || part == linear.rows) continue;
      needed = needed || format != WeightFormat::fp8 || !config.fp8_prefill;
      bytes = std::max(bytes, static_cast<std::size_t>(part) * static_cast<std::size_t>(linear.cols) * 2);
    }
  }
  return needed ? bytes : 0;
}

}  // namespace

bool follows_norm(const std::string& stem) { return stem.ends_with("attn.qkv") || stem.ends_with("mlp.gate_up"); }

bool DecoderConfig::has_bias(const std::string& stem) const {
  return std::find(biases.begin(), biases.end(), stem) != biases.end();
}

FormatAndGroup DecoderConfig::format_of(const std::string& stem) const {
  if (const auto found = formats.find(stem); found != formats.end()) return found->second;
  const WeightFormat format = stem == "embed" ? embedding_format : stem == "head" ? head_format : layer_format;
  return {format, is_grouped(format) ? group_size : 0};
}

FormatAndGroup DecoderConfig::format_of(int layer, const std::string& stem) const {
  return format_of("layers." + std::to_string(layer) + "." + stem);
}

bool DecoderConfig::any_layer_is(const std::string& stem, WeightFormat format) const {
  for (int layer = 0; layer < num_layers; ++layer) {
    if (format_of(layer, stem).first == format) return true;
  }
  return false;
}

bool DecoderConfig::has_fp8_layers() const {
  const std::vector<LinearShape> linears = layer_linears(*this);
  return std::any_of(linears.begin(), linears.end(),
                     [this](const LinearShape& linear) { return any_layer_is(linear.stem, WeightFormat::fp8); });
}

bool DecoderConfig::copies(WeightFormat format) const {
  if (!has_cublaslt || format == WeightFormat::bf16) return false;
  return format != WeightFormat::int4 || !packs_all();
}

bool DecoderConfig::packs_all() const {
  return max_packed_tokens > 0 && (row_invariant || max_packed_tokens >= max_tokens);
}

int DecoderConfig::copied_rows(WeightFormat format, int rows, int cols) const {
  std::size_t bytes = copied_bytes > 0 ? copied_bytes : kCopiedBytesOfHbm;
  // Seldom: a prompt without an adapter is multiplied in FP8.
  if (format == WeightFormat::fp8 && fp8_prefill) bytes = std::min(bytes, kUncachedBytes);
  const std::size_t row_bytes = static_cast<std::size_t>(cols) * 2;
  if (static_cast<std::size_t>(rows) * row_bytes <= bytes) return rows;
  const int most = std::max(1, static_cast<int>(bytes / 2 / (row_bytes * 128))) * 128;
  const int parts = (rows + most - 1) / most;
  const int even = (rows + parts - 1) / parts;  // parts of about the same size
  return std::min((even + 127) / 128 * 128, rows);
}

bool DecoderConfig::needs_cublaslt() const {
  for (int layer = 0; layer < num_layers; ++layer) {
    for (const LinearShape& linear : layer_linears(*this)) {
      if (format_of(layer, linear.stem).first != WeightFormat::int4 || !packs_all()) return true;
    }
  }
  return false;
}

int DecoderConfig::window(int layer) const {
  return sliding_windows.empty() ? 0 : sliding_windows[static_cast<std::size_t>(layer)];
}

std::string DecoderConfig::rope(int layer) const {
  return layer_ropes.empty() ? "rope" : layer_ropes[static_cast<std::size_t>(layer)];
}

std::vector<std::string> DecoderConfig::ropes() const {
  if (layer_ropes.empty()) return {"rope"};
  const std::set<std::string> all(layer_ropes.begin(), layer_ropes.end());
  return {all.begin(), all.end()};
}

std::size_t DecoderConfig::kv_bytes_per_token() const {
  return std::size_t{2} * static_cast<std::size_t>(num_layers * num_kv_heads * head_dim) *
         kernels::kv_element_bytes(kv_format);
}

std::vector<LinearShape> layer_linears(const DecoderConfig& config) {
  return {{"attn.qkv", config.qkv_width(), config.hidden_size},
          {"attn.o", config.hidden_size, config.q_width()},
          {"mlp.gate_up", 2 * config.intermediate_size, config.hidden_size},
          {"mlp.down", config.hidden_size, config.intermediate_size}};
}

std::vector<std::string> hidden_norms(const DecoderConfig& config) {
  std::vector<std::string> norms = {"input_norm", "post_norm"};
  if (config.output_norms) norms.insert(norms.end(), {"attn.out_norm", "mlp.out_norm"});
  return norms;
}

DecoderConfig decide(DecoderConfig config, const GpuTraits& gpu) {
  config.check();
  config.has_cublaslt = gpu.has_cublaslt;
  const bool has_small_cache = gpu.l2_bytes < kSmallL2Bytes;
  if (config.max_packed_tokens < 0) {
    const bool for_all = has_small_cache || !gpu.has_cublaslt;
    config.max_packed_tokens = for_all ? config.max_tokens : config.row_invariant ? 0 : kMaxPackedTokens;
  }
  // The two ways sum in another order, so that with row_invariant it is one of them for all.
  if (config.max_packed_tokens > 0 && config.row_invariant) config.max_packed_tokens = config.max_tokens;
  if (config.copied_bytes == 0) {
    config.copied_bytes = gpu.bus_bits >= kHbmBits ? kCopiedBytesOfHbm
                          : has_small_cache        ? kUncachedBytes
                                                   : static_cast<std::size_t>(gpu.l2_bytes);
  }
  return config;
}

void plan_token_loop(MemoryPlan& plan, const DecoderConfig& config, std::size_t num_tokens, std::size_t num_rows) {
  const auto hidden = static_cast<std::size_t>(config.hidden_size);
  const auto vocab = static_cast<std::size_t>(config.num_rows());  // of the logits
  plan.add("workspace", "residual", num_tokens * hidden * sizeof(float));
  plan.add("workspace", "residual_bf16", num_tokens * hidden * 2);
  plan.add("workspace", "decode_inputs", std::size_t{3} * kMaxBatch * sizeof(std::int32_t));
  plan.add("workspace", "step_counts", std::size_t{kMaxBatch} * sizeof(std::int32_t));
  plan.add("logits", "logits", num_rows * vocab * sizeof(float));
  plan.add("logits", "scores", std::size_t{kMaxBatch} * vocab * sizeof(float));
  plan.add("logits", "sampling_rows", std::size_t{kMaxBatch} * sizeof(kernels::SamplingRow));
  plan.add("logits", "token_counts", std::size_t{kMaxBatch} * vocab * sizeof(std::uint32_t));
  plan.add("logits", "token_mask", std::size_t{kMaxBatch} * ((vocab + 31) / 32) * sizeof(std::uint32_t));
  plan.add("logits", "bias_ids", std::size_t{kMaxBatch} * kMaxBias * sizeof(std::int32_t));
  plan.add("logits", "bias_values", std::size_t{kMaxBatch} * kMaxBias * sizeof(float));
  plan.add("logits", "seen_ids",
           std::size_t{kMaxBatch} * static_cast<std::size_t>(config.capacity) * sizeof(std::int32_t));
}

MemoryPlan plan_memory(const DecoderConfig& config) {
  config.check();
  MemoryPlan plan;
  const auto hidden = static_cast<std::size_t>(config.hidden_size);
  plan_linear(plan, "embed", config.vocab_size, config.hidden_size, config.format_of("embed"));
  if (!config.tied_head) plan_linear(plan, "head", config.num_rows(), config.hidden_size, config.format_of("head"));
  if (config.head_rows > 0) {
    plan.add("weights", "vocab_map", static_cast<std::size_t>(config.head_rows) * sizeof(std::int32_t));
  }
  plan.add("weights", "final_norm.weight", hidden * 2);
  const std::size_t rope =
      static_cast<std::size_t>(config.num_positions) * static_cast<std::size_t>(config.head_dim / 2);
  for (const std::string& stem : config.ropes()) {
    plan.add("weights", stem + ".cos", rope * sizeof(float));
    plan.add("weights", stem + ".sin", rope * sizeof(float));
  }
  for (int layer = 0; layer < config.num_layers; ++layer) {
    const std::string at = "layers." + std::to_string(layer) + ".";
    for (const LinearShape& linear : layer_linears(config)) {
      plan_linear(plan, at + linear.stem, linear.rows, linear.cols, config.format_of(layer, linear.stem));
      plan_input_map(plan, config, at + linear.stem, linear.cols);
      if (config.has_bias(linear.stem)) {
        plan.add("weights", at + linear.stem + ".bias", static_cast<std::size_t>(linear.rows) * sizeof(float));
      }
    }
    for (const std::string& norm : hidden_norms(config)) plan.add("weights", at + norm + ".weight", hidden * 2);
    if (config.qk_norm) {
      for (const char* norm : {"attn.q_norm", "attn.k_norm"}) {
        plan.add("weights", at + norm + ".weight", static_cast<std::size_t>(config.head_dim) * 2);
      }
    }
  }

  plan.add("kv_cache", "kv",
           static_cast<std::size_t>(config.num_slots) * static_cast<std::size_t>(config.capacity) *
               config.kv_bytes_per_token());

  const int verified = config.max_verify_tokens > 0 ? verify_class(config.max_verify_tokens) : 0;
  const auto tokens = static_cast<std::size_t>(std::max(config.max_tokens, verified));
  const auto intermediate = static_cast<std::size_t>(config.intermediate_size);
  const auto qkv = static_cast<std::size_t>(config.qkv_width());
  const auto q = static_cast<std::size_t>(config.q_width());
  plan.add("workspace", "normed", tokens * hidden * 2);
  plan.add("workspace", "delta", tokens * hidden * 2);
  const auto decoded = static_cast<std::size_t>(std::max(kMaxBatch, verified));
  if (config.output_norms) plan.add("workspace", "delta_f32", decoded * hidden * sizeof(float));
  plan.add("workspace", "qkv", std::max(tokens * 2, decoded * sizeof(float)) * qkv);
  plan.add("workspace", "q", tokens * q * 2);
  plan.add("workspace", "attended", tokens * q * 2);
  plan.add("workspace", "gate_up", tokens * std::max(2 * intermediate, qkv) * 2);  // and a draft's QKV in bf16
  plan.add("workspace", "activated", tokens * intermediate * 2);
  if (!config.ordered.empty() || !config.factored.empty()) {
    plan.add("workspace", "mapped_x", tokens * std::max({hidden, q, intermediate}) * 2);
  }
  plan.add("workspace", "prefill_inputs", (3 * tokens + 8) * sizeof(std::int32_t));
  plan.add("workspace", "attention",
           kernels::decode_attention_workspace_bytes(kMaxBatch, config.num_heads, config.head_dim));
  if (verified > 0) {
    plan.add("workspace", "verify_inputs", sizeof(VerifyInputs));
    plan.add("workspace", "tree_attention",
             kernels::tree_attention_workspace_bytes(verified, config.num_heads, config.head_dim));
  }
  plan.add("workspace", "scratch", scratch_bytes(config));
  if (const std::size_t side = side_scratch_bytes(config); side > 0) {
    plan.add("workspace", "side_scratch", side);
    plan.add("workspace", "side_cublaslt", MatrixProducts::kWorkspaceBytes);
  }
  if (config.has_cublaslt && config.needs_cublaslt()) {
    plan.add("workspace", "cublaslt", MatrixProducts::kDeviceBytes);
  }
  if (config.has_fp8_layers() && config.fp8_prefill) {
    plan.add("workspace", "x_fp8", tokens * std::max({hidden, q, intermediate}));
    plan.add("workspace", "x_scales", tokens * sizeof(float));
  }
  plan_token_loop(plan, config, tokens, static_cast<std::size_t>(std::max(kMaxLogitRows, verified)));
  plan.add("logits", "block_max",
           std::size_t{kMaxBatch} * static_cast<std::size_t>(kernels::gemv_max_blocks(config.num_rows())) *
               sizeof(unsigned long long));
  plan_adapters(plan, config);
  plan.set_aside(driver_bytes(config));
  return plan;
}

}  // namespace edgellm
