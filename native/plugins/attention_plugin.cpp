#include "attention_plugin.hpp"

#include <algorithm>
#include <array>

#include "attention_step.hpp"
#include "convert.hpp"
#include "edgellm/kernels/attention_decode.hpp"
#include "edgellm/kernels/attention_tree.hpp"

namespace edgellm::plugins {

using nvinfer1::DataType;
using nvinfer1::PluginTensorDesc;

namespace {

constexpr std::array<std::int32_t, 5> kHeadDims = {64, 80, 96, 128, 256};

void check_setting(const char* name, bool valid, std::int32_t value, const char* allowed) {
  if (!valid) throw std::invalid_argument(std::string(name) + " is " + std::to_string(value) + "; allowed: " + allowed);
}

kernels::KvFormat kv_format(DataType type) {
  if (type == DataType::kHALF) return kernels::KvFormat::fp16;
  return type == DataType::kBF16 ? kernels::KvFormat::bf16 : kernels::KvFormat::fp8;
}

}  // namespace

// The pieces of the workspace, for a step of batch * tokens_each tokens.
struct AttentionPlugin::Scratch {
  float* qkv;
  __nv_bfloat16* queries;
  __nv_bfloat16* out;
  std::int32_t *slots, *positions, *starts, *token_slots, *token_positions, *depths;
  __nv_bfloat16* gains;
  void* attention;
  std::size_t used;
};

std::vector<Field<AttentionSettings>> AttentionPlugin::fields() {
  using S = AttentionSettings;
  return {{"num_heads", &S::num_heads, nullptr, true}, {"num_kv_heads", &S::num_kv_heads, nullptr, true},
          {"head_dim", &S::head_dim, nullptr, true},   {"scale", nullptr, &S::scale, true},
          {"window", &S::window, nullptr, false},      {"qk_norm", &S::qk_norm, nullptr, false},
          {"norm_eps", nullptr, &S::norm_eps, false},  {"tree", &S::tree, nullptr, false}};
}

AttentionPlugin::AttentionPlugin(const AttentionSettings& settings) : PluginBase(settings) {
  const AttentionSettings& s = settings_;
  check_setting("head_dim", std::find(kHeadDims.begin(), kHeadDims.end(), s.head_dim) != kHeadDims.end(), s.head_dim,
                "64, 80, 96, 128, 256");
  check_setting("num_kv_heads", s.num_kv_heads > 0, s.num_kv_heads, "1 and more");
  check_setting("num_heads", s.num_heads > 0 && s.num_heads % s.num_kv_heads == 0, s.num_heads,
                "multiples of num_kv_heads");
  check_setting("window", s.window >= 0, s.window, "0 (none) and more");
  check_setting("qk_norm", s.qk_norm == 0 || s.qk_norm == 1, s.qk_norm, "0, 1");
  check_setting("tree", s.tree == 0 || s.tree == 1, s.tree, "0, 1");
  if (!(s.scale > 0.0f)) {
    throw std::invalid_argument("scale is " + std::to_string(s.scale) + "; it must be above 0");
  }
}

std::int32_t AttentionPlugin::getAliasedInput(std::int32_t output) noexcept { return output == 1 ? 1 : -1; }

std::int32_t AttentionPlugin::getOutputDataTypes(DataType* out, std::int32_t num_out, const DataType* in,
                                                 std::int32_t num_in) const noexcept {
  return guarded(kName, -1, [&] {
    check_count("inputs", num_in, num_inputs());
    check_count("outputs", num_out, 2);
    out[0] = in[0];
    out[1] = in[1];
    return 0;
  });
}

std::int32_t AttentionPlugin::getOutputShapes(const nvinfer1::DimsExprs* in, std::int32_t num_in,
                                              const nvinfer1::DimsExprs*, std::int32_t, nvinfer1::DimsExprs* out,
                                              std::int32_t num_out, nvinfer1::IExprBuilder& builder) noexcept {
  return guarded(kName, -1, [&] {
    check_count("inputs", num_in, num_inputs());
    check_count("outputs", num_out, 2);
    out[0] = in[0];
    out[0].d[2] = builder.constant(settings_.num_heads * settings_.head_dim);
    out[1] = in[1];
    return 0;
  });
}

void AttentionPlugin::check_tensors(const PluginTensorDesc* in, std::int32_t num_in, const PluginTensorDesc* out,
                                    std::int32_t num_out) const {
  check_count("inputs", num_in, num_inputs());
  check_count("outputs", num_out, 2);
  const AttentionSettings& s = settings_;
  check_dims("qkv", in[0].dims, {-1, -1, (s.num_heads + 2 * s.num_kv_heads) * s.head_dim});
  const std::int64_t batch = in[0].dims.d[0], tokens = in[0].dims.d[1];
  check_dims("past_kv", in[1].dims, {batch, 2, s.num_kv_heads, -1, s.head_dim});
  const std::int64_t capacity = in[1].dims.d[3];
  check_dims("position_ids", in[2].dims, {batch, tokens});
  check_dims("write_indices", in[3].dims, {batch});
  for (int i = 4; i < 6; i++) check_dims(i == 4 ? "cos" : "sin", in[i].dims, {-1, s.head_dim / 2});
  for (int i = 6; i < 6 + 2 * s.qk_norm; i++) check_dims(i == 6 ? "q_gain" : "k_gain", in[i].dims, {s.head_dim});
  if (s.tree) check_dims("tree_masks", in[num_in - 1].dims, {batch, tokens});
  const std::int64_t rotated = std::min(in[4].dims.d[0], in[5].dims.d[0]);
  if (rotated >= 0 && capacity > rotated) {
    throw std::invalid_argument("past_kv has room for " + std::to_string(capacity) + " tokens, but cos and sin for " +
                                std::to_string(rotated) + "; build with a smaller --max-context");
  }
  if (capacity >= 0 && tokens > capacity) {
    throw std::invalid_argument("a step of " + std::to_string(tokens) + " tokens exceeds the cache's capacity of " +
                                std::to_string(capacity) + "; lower --max-input");
  }
  check_dims("attention", out[0].dims, {batch, tokens, s.num_heads * s.head_dim});
  check_dims("present_kv", out[1].dims, {batch, 2, s.num_kv_heads, capacity, s.head_dim});
}

AttentionPlugin::Scratch AttentionPlugin::scratch(void* workspace, std::int64_t batch, std::int64_t each) const {
  const AttentionSettings& s = settings_;
  const std::size_t tokens = static_cast<std::size_t>(batch) * each, sequences = static_cast<std::size_t>(batch);
  const std::size_t q_width = static_cast<std::size_t>(s.num_heads) * s.head_dim;
  Pieces pieces(workspace);
  Scratch all;
  all.qkv = pieces.take<float>(tokens * (s.num_heads + 2 * s.num_kv_heads) * s.head_dim);
  all.queries = pieces.take<__nv_bfloat16>(each > 1 ? tokens * q_width : 0);
  all.out = pieces.take<__nv_bfloat16>(tokens * q_width);
  all.slots = pieces.take<std::int32_t>(sequences);
  all.positions = pieces.take<std::int32_t>(sequences);
  all.starts = pieces.take<std::int32_t>(2 * sequences);
  all.token_slots = pieces.take<std::int32_t>(tokens);
  all.token_positions = pieces.take<std::int32_t>(tokens);
  all.depths = pieces.take<std::int32_t>(tokens);
  all.gains = pieces.take<__nv_bfloat16>(2 * static_cast<std::size_t>(s.head_dim));
  const int together = static_cast<int>(std::min<std::int64_t>(batch, kernels::kMaxDecodeBatch));
  std::size_t bytes = kernels::decode_attention_workspace_bytes(together, s.num_heads, s.head_dim);
  if (s.tree && each > 1) {
    const int most = static_cast<int>(std::min<std::int64_t>(each, kernels::kMaxTreeTokens));
    bytes = std::max(bytes, kernels::tree_attention_workspace_bytes(most, s.num_heads, s.head_dim));
  }
  all.attention = pieces.take<std::byte>(bytes);
  all.used = pieces.used();
  return all;
}

std::size_t AttentionPlugin::workspace_bytes(const nvinfer1::DynamicPluginTensorDesc* in) const {
  return scratch(nullptr, std::max<std::int64_t>(1, largest(in[0], 0)), std::max<std::int64_t>(1, largest(in[0], 1)))
      .used;
}

std::int32_t AttentionPlugin::enqueue(const PluginTensorDesc* in, const PluginTensorDesc*, const void* const* inputs,
                                      void* const* outputs, void* workspace, cudaStream_t stream) noexcept {
  return guarded(kName, -1, [&] {
    const AttentionSettings& s = settings_;
    if (inputs[1] != outputs[1]) {
      throw std::invalid_argument(
          "present_kv is not where past_kv is; bind both to one address, and build with "
          "PreviewFeature::kALIASED_PLUGIN_IO_10_03");
    }
    const std::int64_t batch = in[0].dims.d[0], each = in[0].dims.d[1];
    if (batch == 0 || each == 0) return 0;
    const bool half = in[0].type == DataType::kHALF;
    const bool tree = s.tree && each > 1 && each <= kernels::kMaxTreeTokens;
    const Scratch w = scratch(workspace, batch, each);

    PrepareArgs lists;
    lists.position_ids = static_cast<const std::int64_t*>(inputs[2]);
    lists.write_indices = static_cast<const std::int64_t*>(inputs[3]);
    lists.batch = static_cast<int>(batch);
    lists.tokens_each = static_cast<int>(each);
    lists.capacity = static_cast<int>(in[1].dims.d[3]);
    lists.q_gain = s.qk_norm ? static_cast<const float*>(inputs[6]) : nullptr;
    lists.k_gain = s.qk_norm ? static_cast<const float*>(inputs[7]) : nullptr;
    lists.head_dim = s.head_dim;
    lists.out_width = s.num_heads * s.head_dim;
    lists.slots = w.slots;
    lists.positions = w.positions;
    lists.starts = w.starts;
    lists.token_slots = w.token_slots;
    lists.token_positions = w.token_positions;
    lists.depths = w.depths;
    lists.gains = w.gains;
    lists.out = half ? w.out : static_cast<__nv_bfloat16*>(outputs[0]);
    // For no sequence, a kernel's workspace is its counters: zeros between calls, but other layers write here too.
    const std::size_t counters = tree ? kernels::tree_attention_workspace_bytes(0, s.num_heads, s.head_dim)
                                      : kernels::decode_attention_workspace_bytes(0, s.num_heads, s.head_dim);
    lists.counters = static_cast<std::uint32_t*>(w.attention);
    lists.num_counters = static_cast<int>(counters / sizeof(std::uint32_t));
    prepare_async(lists, stream);

    AttentionStep step = {s,         batch,     each,  {},      {},          nullptr, inputs[0],
                          w.queries, lists.out, lists, nullptr, w.attention, stream};
    step.kv = {outputs[1], kv_format(in[1].type), s.num_kv_heads, lists.capacity, s.head_dim};
    step.rope.cos = static_cast<const float*>(inputs[4]);
    step.rope.sin = static_cast<const float*>(inputs[5]);
    step.rope.q_gain = s.qk_norm ? w.gains : nullptr;
    step.rope.k_gain = s.qk_norm ? w.gains + s.head_dim : nullptr;
    step.rope.norm_eps = s.norm_eps;
    if (tree) step.masks = static_cast<const std::uint64_t*>(inputs[num_inputs() - 1]);
    const std::size_t tokens = static_cast<std::size_t>(batch) * each;
    if (half || tree || each == 1) {  // prompts are read in bf16 too
      to_float_async(inputs[0], half ? Activation::fp16 : Activation::bf16, w.qkv, tokens * step.width(), stream);
      step.qkv = w.qkv;
    }
    attention_async(step);
    if (half) to_fp16_async(w.out, outputs[0], tokens * step.q_width(), stream);
    return 0;
  });
}

}  // namespace edgellm::plugins
