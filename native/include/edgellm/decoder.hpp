// The decoder: single tokens through the fused kernels as one CUDA graph, many tokens through matrix products.
#pragma once

#include <algorithm>
#include <cstdint>
#include <map>
#include <memory>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "edgellm/adapters.hpp"
#include "edgellm/arena.hpp"
#include "edgellm/cublaslt.hpp"
#include "edgellm/decoder_config.hpp"
#include "edgellm/kernels/gemv.hpp"
#include "edgellm/kv_cache.hpp"
#include "edgellm/memory.hpp"
#include "edgellm/prompt_chunks.hpp"
#include "edgellm/stream.hpp"
#include "edgellm/token_loop.hpp"
#include "edgellm/verify_inputs.hpp"
#include "edgellm/weights.hpp"

namespace edgellm {

class Decoder final : public TokenLoop {
 public:
  // Takes all device memory, as planned. Throws std::invalid_argument for what the kernels cannot do.
  explicit Decoder(const DecoderConfig& config);
  ~Decoder() override;

  // Why prompts run through the decode kernels, for want of cuBLASLt; empty when they do not.
  const std::string& products_reason() const noexcept { return products_reason_; }
  // Whether prefill multiplies in FP8: fp8 layers, fp8_prefill and a GPU and library that can.
  bool has_fp8_products() const noexcept { return fp8_products_; }
  // Drafts of more than kMaxBatch nodes are verified with the matrix products of prompts, if their class is not above
  // this; 0: none is. The same goes for prompts of so many tokens that are shorter than min_gemm_tokens.
  int most_multiplied_nodes() const noexcept { return most_multiplied_nodes_; }
  // Whether such a draft's logits are a product with the head, too; num_rows: its class.
  bool multiplies_head(int num_rows) const;

  void load_linear(const std::string& stem, const HostTensor& weight, const HostTensor* scale);
  void load_vector(const std::string& name, const HostTensor& values);
  void load_vocab_map(const HostTensor& token_ids);
  void load_order(const std::string& stem, const HostTensor& order);
  // Checks that every weight is there, runs every kind of step once and captures its graph.
  void finish_load();

  // Puts an adapter into place `index` of 1 to max_adapters, over what was there; its tensors are on the host. Between
  // steps, also of running sequences. Throws std::invalid_argument, and changes nothing, for what does not fit.
  void load_adapter(int index, std::span<const AdapterTensors> tensors);
  void unload_adapter(int index);

  // Milliseconds on the device of each of `num_steps` verifications of a chain, without the copy of its logits.
  std::vector<float> time_verify(int slot, int position, int num_tokens, int num_steps);

  // Tile configurations that a decode product (a linear layer's stem, or "head") can have at a batch size.
  int num_tiles(const std::string& product, int batch) const;
  // Chooses one, -1 for the kernel's own choice, and drops the graphs of that batch size. With batch_invariant it is
  // for every batch size: all must sum in the same order.
  void set_tile(const std::string& product, int batch, int tile);

 private:
  void check_adapter(int adapter) const override { adapters_.check(adapter); }
  StepKey arrange_async(std::span<const std::int32_t> slots, std::span<const std::int32_t> adapters) override;
  int context_class(int length) const override {
    return std::min(kernels::decode_attention_class(length), config_.capacity);
  }
  void record_step_async(const StepKey& key) override;
  void several_async(const SequenceStep& item, int first_row) override;
  const KvCache& cache() const override { return cache_; }
  const kernels::WeightView& embedding() const override { return weights_.embedding(); }
  const std::int32_t* row_tokens() const override { return weights_.vocab_map(); }
  void copy_prefix_async(int source, int target, int length) override;
  void save_prefix_async(int slot, int length, std::byte* host) override;
  void load_prefix_async(int slot, int length, const std::byte* host) override;

  kernels::GemvArgs gemv_args(const LinearView& linear, const char* product, int num_tokens) const;
  kernels::GemvArgs head_args(int num_rows, bool with_maximum) const;
  int num_head_blocks(int batch) const;
  // Of a linear layer's stem, or "head".
  kernels::GemvArgs product_args(const std::string& product, int batch) const;
  // x is the copy of `residual` in bf16.
  void record_head_async(int num_rows, const __nv_bfloat16* x, const float* residual, bool with_maximum, bool pdl);
  void cap_logits_async(int num_rows);

  // Which linear layers of a step look for adapters, when its sequences have these. Throws for one that is not loaded.
  unsigned adapted_linears(std::span<const std::int32_t> adapters) const;
  // Brings the adapters of a decode step's sequences, or of a draft's nodes, to the device.
  void upload_adapters_async(std::span<const std::int32_t> adapters);
  // Computes A x, to which a linear layer's call with args.lora will apply B.
  void adapt_async(const kernels::GemvArgs& args, bool pdl);
  // y += B (A x) after a prefill product, unless the adapter has nothing for this linear layer. pdl: of its first
  // kernel, or, where there is none, of the next one; returns what the next one may have.
  bool adapt_product_async(int adapter, int layer, Linear linear, const __nv_bfloat16* x, __nv_bfloat16* y,
                           int num_tokens, bool pdl);
  // The loaded adapters may be for other linear layers than before: captures the graphs that look for those.
  void capture_adapted();
  void warm_up_adapters();

  // Whether a step of several tokens verifies a draft: it asks for every token's logits, and is short.
  bool verifies(const SequenceStep& item) const;
  StepKey prepare_verify_async(int slot, int position, std::span<const std::int32_t> token_ids,
                               std::span<const std::int32_t> parents, int adapter);
  void verify_async(int slot, int position, std::span<const std::int32_t> token_ids,
                    std::span<const std::int32_t> parents, int first_row, int adapter) override;
  void record_verify_attention_async(int layer, const StepKey& key, bool pdl);
  // A draft of more nodes than the fast decode kernels take at once, with the matrix products of prompts: where every
  // layer has them without a copy of its weights, and for no adapter.
  bool multiplies_draft(const StepKey& key) const;
  int count_multiplied_nodes() const;
  void record_draft_products_async(const StepKey& key);
  void record_exact_chain_attention_async(int layer, int count, bool pdl);
  // A product of a decode step, cut where it has more tokens than one kernel takes; with its adapters if it has
  // args.lora.
  void decode_product_async(kernels::GemvArgs args, bool pdl);
  // x as the linear layer's columns take it: itself, or mapped_x.
  const __nv_bfloat16* map_input_async(const LinearView& linear, const __nv_bfloat16* x, int num_tokens, bool pdl);
  // The same for args.x, and the norm's gain with it; returns whether what follows may be launched dependently.
  bool map_args_async(const LinearView& linear, kernels::GemvArgs& args, bool pdl);
  void warm_up_verify();
  void prefill_async(const SequenceStep& item, int first_row);
  void warm_up_prompts();
  void prefill_chunk_async(const SequenceStep& item, const PromptChunk& chunk, int first_row, bool products);
  // num_rows: so many of the last tokens go on after the keys and values, and come out as the first rows of
  // residual_bf16; or none.
  void prefill_layer_async(int layer, int num_tokens, int num_rows, bool products, int adapter);
  // The rest of a layer, from "attended" on: `num_rows` tokens, to the residual's rows from `skipped` on.
  void after_attention_async(int layer, int skipped, int num_rows, bool products, int adapter);
  // Sets products_ up and chooses its algorithms, on memory whose contents are lost.
  void prepare_products();
  // Whether a prompt's product takes x_fp8; `products` and `adapter` as in prefill_layer_async.
  bool multiplies_fp8(const LinearView& linear, bool products, int adapter) const;
  // For drafts, on memory whose contents are lost: see head_products_.
  void prepare_head_product();
  void head_product_async(int num_rows);
  // A layer's product with what its kind and the adapter ask for: y = x W^T + B (A x), from x_fp8 where it is in FP8.
  // Returns what product_async does.
  bool prompt_product_async(int layer, Linear linear, const __nv_bfloat16* x, __nv_bfloat16* y, int num_tokens,
                            int adapter);
  // What prompt_product_async has left out of y.
  kernels::ProductScales product_scales(const LinearView& linear, bool products, int adapter) const;
  // Returns whether the next kernel may be launched with programmatic dependent launch.
  bool product_async(const LinearView& linear, bool gate_up, const __nv_bfloat16* x, __nv_bfloat16* y, int num_tokens);
  // Rounds x, (num_tokens, width), to x_fp8 with x_scales.
  void quantize_x_async(const __nv_bfloat16* x, int num_tokens, int width);
  void fp8_product_async(const LinearView& linear, __nv_bfloat16* y, int num_tokens);
  void gemv_rows_async(const LinearView& linear, const __nv_bfloat16* x, __nv_bfloat16* y, int num_tokens,
                       int out_width, kernels::Epilogue epilogue, int layer, Linear which, int adapter);

  int num_sms_ = 0;
  int most_splits_ = 0;  // of attention, for a sequence of any length
  Weights weights_;
  KvCache cache_;
  Adapters adapters_;
  std::unique_ptr<MatrixProducts> products_;       // null where there is no cuBLASLt, and where no prompt needs it
  std::unique_ptr<MatrixProducts> head_products_;  // of a draft's nodes with a head in bf16; null where there is none
  std::string products_reason_;
  bool fp8_products_ = false;
  int most_multiplied_nodes_ = 0;
  Stream side_stream_;  // of every second part of a dequantised product
  Event fork_;
  Event join_;
  // The tile that set_tile chose for a product at a number of tokens (0: at any), of layers stored in this format.
  struct Tile {
    kernels::WeightFormat format = kernels::WeightFormat::bf16;
    int group = 0;
    int index = -1;
  };
  std::map<std::pair<std::string, int>, Tile> tiles_;
  bool ready_ = false;
};

}  // namespace edgellm
