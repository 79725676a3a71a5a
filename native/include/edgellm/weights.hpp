// A decoder's weights on the device: filled once from the bundle's tensors, then read by the kernels as views.
#pragma once

#include <array>
#include <string>
#include <vector>

#include "edgellm/arena.hpp"
#include "edgellm/decoder_config.hpp"
#include "edgellm/tensor.hpp"

namespace edgellm {

struct LinearView {
  kernels::WeightView weight;
  const float* bias = nullptr;
  const std::int32_t* order = nullptr;          // (cols) which input feature each column takes; null: its own
  const float* factor = nullptr;                // (cols) of each column's input; null: none
  const __nv_bfloat16* ordered_gain = nullptr;  // (cols) of the norm before, with `order`

  bool maps_input() const { return order != nullptr || factor != nullptr; }
};

struct LayerWeights {
  LinearView qkv;
  LinearView o;
  LinearView gate_up;
  LinearView down;
  const __nv_bfloat16* input_norm = nullptr;     // (hidden)
  const __nv_bfloat16* post_norm = nullptr;      // (hidden)
  const __nv_bfloat16* attn_out_norm = nullptr;  // (hidden), or null: none
  const __nv_bfloat16* mlp_out_norm = nullptr;   // (hidden), or null: none
  kernels::RopeTables rope;

  std::array<const LinearView*, 4> linears() const { return {&qkv, &o, &gate_up, &down}; }  // as layer_linears has them
};

// A tensor in host memory, as the file has it.
struct HostTensor {
  const void* data = nullptr;
  DType dtype = DType::kFloat32;
  Shape shape;
};

// Views into an arena that must outlive this.
class Weights {
 public:
  Weights(const Arena& arena, const DecoderConfig& config);

  // Uploads a linear layer's or the embedding's weight by its stored stem ("layers.0.attn.qkv", "embed"), turning it
  // into the format that the configuration names: fp32 and fp16 to bf16 or fp8; int8 and E4M3 bytes stay; int4 is
  // repacked. scale: (rows, cols / group) fp16 for int8 and int4, with a last axis of 2 for int8_offset, (rows) fp32
  // for E4M3 bytes, (rows, cols / group) for fp8_blocks, else null. Throws std::invalid_argument for a dtype or shape
  // that is not the plan's. Waits for the stream.
  void load_linear(const std::string& stem, const HostTensor& weight, const HostTensor* scale, cudaStream_t stream);
  // Uploads a norm's gain, a bias or a rope table (fp32) by its stored name. Waits for the stream.
  void load_vector(const std::string& name, const HostTensor& values, cudaStream_t stream);
  // Uploads the tokens that have a row in the head, (head_rows) int32, ascending. Waits for the stream.
  // Throws std::invalid_argument for another shape or ids that do not ascend or are not the model's.
  void load_vocab_map(const HostTensor& token_ids, cudaStream_t stream);
  // Uploads the order of a layer's input (cols) int32 by the layer's stem. Waits for the stream.
  void load_order(const std::string& stem, const HostTensor& order, cudaStream_t stream);
  // Names that were planned but never loaded.
  std::vector<std::string> missing() const;

  const LayerWeights& layer(int index) const { return layers_[static_cast<std::size_t>(index)]; }
  const kernels::WeightView& embedding() const { return embedding_; }
  const kernels::WeightView& head() const { return head_; }
  const __nv_bfloat16* final_norm() const { return final_norm_; }
  const std::int32_t* vocab_map() const {
    return vocab_map_;
  }  // (head_rows) on the device; null: every token has a row

 private:
  kernels::WeightView view(const std::string& stem, int rows, int cols) const;
  kernels::WeightView& find(const std::string& stem);
  // Tensors of a layer beside its weight, that were planned.
  std::vector<std::string> input_maps(const std::string& stem) const;
  void load_floats(const HostTensor& host, void* to, std::size_t count, cudaStream_t stream);
  void load_fp8(const kernels::WeightView& weight, const HostTensor& host, cudaStream_t stream);

  const Arena& arena_;
  const DecoderConfig& config_;
  std::vector<LayerWeights> layers_;
  kernels::WeightView embedding_;
  kernels::WeightView head_;
  const __nv_bfloat16* final_norm_ = nullptr;
  const std::int32_t* vocab_map_ = nullptr;
  std::vector<std::string> loaded_;
};

}  // namespace edgellm
