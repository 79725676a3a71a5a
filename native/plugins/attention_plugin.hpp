// EdgeLLMAttention: RoPE, writing keys and values to the linear cache, and attention over it: decode, prompt or tree.
//
// Inputs: qkv [B, S, (num_heads + 2 num_kv_heads) head_dim] fp16 or bf16, before RoPE; past_kv [B, 2, num_kv_heads,
// capacity, head_dim] in qkv's type, or E4M3 bytes as FP8 or INT8; position_ids [B, S] int64; write_indices [B] int64;
// cos and sin [positions, head_dim / 2] fp32; with qk_norm: q_gain and k_gain [head_dim] fp32; with tree: tree_masks
// [B, S] int64, of which bit j of token i says that it sees token j.
// Outputs: attention [B, S, num_heads head_dim] of qkv's type; present_kv, which has to be past_kv's own memory.
//
// Token s of sequence b goes to place write_indices[b] + s. Without a tree its position id is that number too; a
// negative one marks where the sequence's tokens end. With a tree, steps of 2 to 64 tokens are trees: position ids turn
// the tokens, all see the places before write_indices[b], and of the new ones those in their mask; of both what the
// window leaves, counted in position ids.
#pragma once

#include "plugin_base.hpp"

namespace edgellm::plugins {

struct AttentionSettings {
  std::int32_t num_heads = 0;
  std::int32_t num_kv_heads = 0;
  std::int32_t head_dim = 0;
  float scale = 0.0f;       // of the scores
  std::int32_t window = 0;  // last positions seen, the token itself included; 0: all
  std::int32_t qk_norm = 0;
  float norm_eps = 1e-6f;
  std::int32_t tree = 0;
};

class AttentionPlugin final : public PluginBase<AttentionPlugin, AttentionSettings> {
 public:
  static constexpr const char* kName = "EdgeLLMAttention";
  static std::vector<Field<AttentionSettings>> fields();
  explicit AttentionPlugin(const AttentionSettings& settings);

  std::int32_t getNbOutputs() const noexcept override { return 2; }
  std::int32_t getAliasedInput(std::int32_t output) noexcept override;
  std::int32_t getOutputDataTypes(nvinfer1::DataType* out, std::int32_t num_out, const nvinfer1::DataType* in,
                                  std::int32_t num_in) const noexcept override;
  std::int32_t getOutputShapes(const nvinfer1::DimsExprs* in, std::int32_t num_in, const nvinfer1::DimsExprs*,
                               std::int32_t, nvinfer1::DimsExprs* out, std::int32_t num_out,
                               nvinfer1::IExprBuilder& builder) noexcept override;
  std::int32_t enqueue(const nvinfer1::PluginTensorDesc* in, const nvinfer1::PluginTensorDesc* out,
                       const void* const* inputs, void* const* outputs, void* workspace,
                       cudaStream_t stream) noexcept override;

  std::int32_t num_inputs() const { return 6 + 2 * settings_.qk_norm + settings_.tree; }
  void check_tensors(const nvinfer1::PluginTensorDesc* in, std::int32_t num_in, const nvinfer1::PluginTensorDesc* out,
                     std::int32_t num_out) const;
  template <class TypeOf>
  bool takes(int position, std::int32_t num_in, TypeOf type) const;
  std::size_t workspace_bytes(const nvinfer1::DynamicPluginTensorDesc* in) const;

 private:
  struct Scratch;
  Scratch scratch(void* workspace, std::int64_t batch, std::int64_t tokens_each) const;
};

template <class TypeOf>
bool AttentionPlugin::takes(int position, std::int32_t num_in, TypeOf type) const {
  using nvinfer1::DataType;
  if (num_in != num_inputs()) return false;
  const DataType activation = type(0), here = type(position);
  const int masks = 6 + 2 * settings_.qk_norm;
  if (position == 0) return here == DataType::kHALF || here == DataType::kBF16;
  if (position == 1) return here == activation || here == DataType::kFP8 || here == DataType::kINT8;
  if (position == 2 || position == 3 || (position == masks && position < num_in)) return here == DataType::kINT64;
  if (position < num_in) return here == DataType::kFLOAT;
  return here == (position == num_in ? activation : type(1));
}

}  // namespace edgellm::plugins
