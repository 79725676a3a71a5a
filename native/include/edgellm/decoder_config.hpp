// What a decoder is and how much it may hold, and from that every byte of device memory that it will use.
#pragma once

#include <map>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "edgellm/arena.hpp"
#include "edgellm/kernels/types.hpp"

namespace edgellm {

// A weight's format and, of int8 and int4, the input features that share a scale.
using FormatAndGroup = std::pair<kernels::WeightFormat, int>;

struct DecoderConfig {
  int num_layers = 0;
  int hidden_size = 0;
  int intermediate_size = 0;
  int num_heads = 0;
  int num_kv_heads = 0;
  int head_dim = 0;
  int vocab_size = 0;
  int head_rows = 0;      // tokens that have a row in the head, as Weights::load_vocab_map has them; 0: all
  int num_positions = 0;  // rows of the rope tables
  float rms_norm_eps = 1e-5F;
  float embed_scale = 1.0F;
  float attention_scale = 0.0F;  // of attention scores; 0: head_dim^-0.5
  float logit_softcap = 0.0F;    // logits become cap * tanh(logits / cap); 0: no cap
  kernels::Activation activation = kernels::Activation::silu;
  bool qk_norm = false;
  bool output_norms = false;         // of what attention and the MLP add to the residual
  bool tied_head = false;            // the head is the embedding table itself
  std::vector<int> sliding_windows;  // one a layer, 0 is none; empty when no layer has one
  // Stem of each layer's tables, STEM.cos and STEM.sin (num_positions, head_dim / 2); empty: "rope" in all layers.
  std::vector<std::string> layer_ropes;

  kernels::WeightFormat layer_format = kernels::WeightFormat::bf16;
  kernels::WeightFormat head_format = kernels::WeightFormat::bf16;
  kernels::WeightFormat embedding_format = kernels::WeightFormat::bf16;  // bf16 or int8
  kernels::KvFormat kv_format = kernels::KvFormat::bf16;
  int group_size = 0;
  // Of weights that differ from the above, by their stored stem: "layers.3.mlp.down", "head", "embed".
  std::map<std::string, FormatAndGroup> formats;
  // Of layers, by their stored stem, whose input is put in another order, or multiplied by a factor, before it is used.
  std::set<std::string> ordered;
  std::set<std::string> factored;
  std::vector<std::string> biases;  // stems of layer 0 that have one, of all layers alike: "attn.qkv", "mlp.down", …

  int num_slots = 1;
  int capacity = 0;    // tokens a slot holds
  int max_tokens = 0;  // of one prefill chunk; longer steps are cut
  // Shorter steps run through the decode kernels, whose rounding is another; but for steps of more than kMaxBatch
  // tokens where products need no copy of a weight, which are faster then. More than max_tokens: all steps do.
  int min_gemm_tokens = 2;
  int max_verify_tokens = 16;  // nodes of a draft verified at once, 2 to 64; 0: none, and nothing is taken for it
  // One decoding sequence gets the bits that it gets among others: the kernels for a single token, which are faster but
  // sum in another order, are left out.
  bool batch_invariant = true;
  // Decode's products after a norm read the residual in fp32 where their weights are bf16, instead of its copy in bf16,
  // and multiply it as two bf16 numbers or in fp32. Not those of more than eight tokens without batch_invariant, nor
  // adapters.
  bool wide_norm_inputs = false;
  // A prompt's results do not depend on how it is cut into chunks; see MatrixProducts.
  bool row_invariant = true;
  // A prompt's products of so many tokens at most are with int4 weights as they are stored, others with a copy in bf16;
  // -1: by the GPU. With row_invariant any number but 0 stands for all.
  int max_packed_tokens = -1;
  // Most bytes of copies in bf16 that are there at a time: larger weights go in parts, of which one is made while
  // another is multiplied. 0: by the GPU, planned as with HBM.
  std::size_t copied_bytes = 0;
  bool has_cublaslt = true;  // by the GPU's machine
  // Prompts through FP8 products where layers are fp8 and the GPU has them: activations are rounded to E4M3 too.
  bool fp8_prefill = true;
  int max_adapters = 0;   // LoRA adapters that may be loaded; 0 takes no memory
  int max_lora_rank = 0;  // of one adapter, 0 to 64
  bool pdl = true;        // programmatic dependent launch, where the GPU has it

  int qkv_width() const { return (num_heads + 2 * num_kv_heads) * head_dim; }
  int q_width() const { return num_heads * head_dim; }
  bool has_bias(const std::string& stem) const;
  FormatAndGroup format_of(const std::string& stem) const;
  FormatAndGroup format_of(int layer, const std::string& stem) const;
  bool any_layer_is(const std::string& stem, kernels::WeightFormat format) const;  // "mlp.down" of any layer
  bool has_fp8_layers() const;
  // Whether prompts have products with a copy of such weights in bf16. Of int4 that is not known, and so planned for,
  // while max_packed_tokens is -1.
  bool copies(kernels::WeightFormat format) const;
  bool packs_all() const;  // all prompts' products with int4 weights are with them as they are stored
  int copied_rows(kernels::WeightFormat format, int rows, int cols) const;  // of such a weight, in a part
  // Whether any product of a prompt is cuBLASLt's, if there is one: all but those with int4 weights as they are stored.
  bool needs_cublaslt() const;
  int num_rows() const { return head_rows > 0 ? head_rows : vocab_size; }  // of the head: a position's logits
  int window(int layer) const;
  std::string rope(int layer) const;
  std::vector<std::string> ropes() const;  // that any layer has
  std::size_t kv_bytes_per_token() const;
  // Throws std::invalid_argument that names what the kernels cannot do.
  void check() const;
};

constexpr int kMaxBatch = 8;         // sequences that one decode step computes
constexpr int kMaxLogitRows = 16;    // that one product with the head computes
constexpr int kHistoryLength = 256;  // steps that the device may be ahead of the host

// One linear layer: where it is in a decoder and what shape it has. `stem` is its stored name without the layer.
struct LinearShape {
  const char* stem;
  int rows;
  int cols;
};
std::vector<LinearShape> layer_linears(const DecoderConfig& config);

// Whether a layer's input is a norm's output, whose gain is then in the order of the input too.
bool follows_norm(const std::string& stem);

// Stems, without the layer, of a layer's norms that are as wide as the residual.
std::vector<std::string> hidden_norms(const DecoderConfig& config);

// What decide() asks about a GPU.
struct GpuTraits {
  int l2_bytes = 0;
  int bus_bits = 0;  // of its memory: thousands where that is HBM
  bool has_cublaslt = true;
};

// config with what it leaves to the GPU, max_packed_tokens, copied_bytes and has_cublaslt, as it is on such a GPU.
// Throws std::invalid_argument as check() does.
DecoderConfig decide(DecoderConfig config, const GpuTraits& gpu);

// What TokenLoop uses: inputs, residual stream of `num_tokens`, `num_rows` rows of logits, and what sampling reads.
void plan_token_loop(MemoryPlan& plan, const DecoderConfig& config, std::size_t num_tokens, std::size_t num_rows);

// Names: stored tensor names for weights; "kv", and the names that decoder.cpp uses for its buffers.
MemoryPlan plan_memory(const DecoderConfig& config);
// Of that, what the driver takes for kernels' code and captured graphs, which is no part of the arena.
std::size_t driver_bytes(const DecoderConfig& config);

}  // namespace edgellm
