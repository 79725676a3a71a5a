// What a decoder can be, before any memory is planned for it: what has no kernel is refused by name.
#include <map>
#include <set>
#include <string>

#include "config_check.hpp"
#include "edgellm/decoder_config.hpp"
#include "edgellm/kernels/gemv.hpp"
#include "edgellm/kernels/lora.hpp"
#include "edgellm/kernels/rms_norm.hpp"
#include "edgellm/verify_inputs.hpp"

namespace edgellm {

using kernels::WeightFormat;

void DecoderConfig::check() const {
  require(num_layers > 0 && hidden_size > 0 && intermediate_size > 0 && vocab_size > 0, "a size of the model is zero");
  require(num_heads > 0 && num_kv_heads > 0 && num_heads % num_kv_heads == 0,
          std::to_string(num_heads) + " heads do not divide into " + std::to_string(num_kv_heads) + " groups");
  require(head_dim == 64 || head_dim == 80 || head_dim == 96 || head_dim == 128 || head_dim == 256,
          "head_dim is " + std::to_string(head_dim) + "; the kernels take 64, 80, 96, 128 and 256");
  for (const int width : {hidden_size, intermediate_size, q_width()}) {
    require(width % 16 == 0, "a layer is " + std::to_string(width) + " wide; the kernels take multiples of 16");
  }
  require(hidden_size <= kernels::kMaxNormWidth, "hidden_size is " + std::to_string(hidden_size) +
                                                     "; the norms take at most " +
                                                     std::to_string(kernels::kMaxNormWidth));
  std::map<std::string, int> stems = {{"embed", hidden_size}, {"head", hidden_size}};  // and their columns
  for (int layer = 0; layer < num_layers; ++layer) {
    for (const LinearShape& linear : layer_linears(*this)) {
      stems["layers." + std::to_string(layer) + "." + linear.stem] = linear.cols;
    }
  }
  for (const auto& [stem, format] : formats) {
    require(stems.contains(stem), "formats has " + stem + ", which the decoder does not");
  }
  for (const std::set<std::string>* mapped : {&ordered, &factored}) {
    for (const std::string& stem : *mapped) {
      require(stems.contains(stem) && stem.starts_with("layers."),
              "ordered or factored has " + stem + ", which is no layer of the decoder");
    }
  }
  for (const std::string& stem : factored) {
    require(!follows_norm(stem), stem + " follows a norm, whose gain takes the factor of its input");
  }
  for (const auto& [stem, cols] : stems) {
    const auto& [format, group] = format_of(stem);
    require(!is_grouped(format) || group == 16 || group == 32 || group == 64 || group == 128,
            stem + " is quantised in groups of " + std::to_string(group) + "; the kernels take 16, 32, 64 and 128");
    require(!is_grouped(format) || cols % group == 0, stem + " has " + std::to_string(cols) +
                                                          " columns, which groups of " + std::to_string(group) +
                                                          " do not divide");
    require(format != WeightFormat::fp8_blocks || group >= 64, stem + " is fp8 in blocks of less than 64 columns");
    require(format != WeightFormat::int4 || !stem.ends_with("gate_up") || intermediate_size % 8 == 0,
            "int4 needs a multiple of 8 as MLP width");
  }
  const WeightFormat embedding = format_of("embed").first;
  require(embedding == WeightFormat::bf16 || embedding == WeightFormat::int8, "the embedding must be bf16 or int8");
  require(head_rows >= 0 && head_rows <= vocab_size && (head_rows == 0 || !tied_head),
          "head_rows is " + std::to_string(head_rows) + "; it must be 0 to vocab_size, and 0 with a tied head");
  require(!tied_head || format_of("head") == format_of("embed"), "a tied head has the embedding's format");
  require(sliding_windows.empty() || static_cast<int>(sliding_windows.size()) == num_layers,
          "sliding_windows has " + std::to_string(sliding_windows.size()) +
              " entries; it must have one for each of the " + std::to_string(num_layers) + " layers, or none");
  require(layer_ropes.empty() || static_cast<int>(layer_ropes.size()) == num_layers,
          "layer_ropes has " + std::to_string(layer_ropes.size()) + " entries; it must have one for each of the " +
              std::to_string(num_layers) + " layers, or none");
  for (const std::string& stem : ropes()) {
    require(stem.starts_with("rope"), "the rope tables " + stem + " must have a name that starts with rope");
  }
  require(attention_scale >= 0.0F, "attention_scale is negative");
  require(logit_softcap >= 0.0F, "logit_softcap is negative");
  require(num_slots > 0, "num_slots is " + std::to_string(num_slots) + "; it must be at least 1");
  require(
      capacity > 0 && capacity <= num_positions,
      "capacity is " + std::to_string(capacity) + "; it must be 1 to num_positions, " + std::to_string(num_positions));
  require(max_tokens >= kernels::kMaxGemvTokens, "max_tokens is " + std::to_string(max_tokens) +
                                                     "; it must be at least " +
                                                     std::to_string(kernels::kMaxGemvTokens));
  require(min_gemm_tokens >= 2, "min_gemm_tokens is " + std::to_string(min_gemm_tokens) + "; it must be at least 2");
  require(max_packed_tokens >= -1, "max_packed_tokens is " + std::to_string(max_packed_tokens) +
                                       "; it must be -1 (by the GPU), 0 (never) or a number of tokens");
  require(max_adapters >= 0 && max_adapters <= 64,
          "max_adapters is " + std::to_string(max_adapters) + "; allowed are 0 to 64");
  require(max_lora_rank >= 0 && max_lora_rank <= kernels::kMaxLoraRank,
          "max_lora_rank is " + std::to_string(max_lora_rank) + "; the kernels take 0 to " +
              std::to_string(kernels::kMaxLoraRank));
  require(max_verify_tokens == 0 || (max_verify_tokens >= 2 && max_verify_tokens <= kMaxVerifyTokens),
          "max_verify_tokens is " + std::to_string(max_verify_tokens) + "; it must be 0 (off) or 2 to " +
              std::to_string(kMaxVerifyTokens));
}

}  // namespace edgellm
