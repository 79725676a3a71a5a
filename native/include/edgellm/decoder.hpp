// The decoder: single tokens through the fused kernels as one CUDA graph, many tokens through matrix products.
#pragma once

#include <array>
#include <compare>
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
#include "edgellm/graph.hpp"
#include "edgellm/kernels/attention_decode.hpp"
#include "edgellm/kernels/gemv.hpp"
#include "edgellm/kernels/sampling.hpp"
#include "edgellm/kv_cache.hpp"
#include "edgellm/memory.hpp"
#include "edgellm/run.hpp"
#include "edgellm/stream.hpp"
#include "edgellm/verify_inputs.hpp"
#include "edgellm/weights.hpp"

namespace edgellm {

// One sequence's share of a step (edgellm_ros/executors/base.py: SequenceStep).
struct SequenceStep {
  int slot = 0;
  std::span<const std::int32_t> token_ids;
  int position = 0;
  int num_logits = 1;
  int adapter = 0;  // 0: none
};

// What ends a decode step.
enum class StepTail : std::uint8_t {
  kLogits,            // begins with the embedding of given tokens; logits for the host
  kGreedy,            // begins where the last step ended; the most likely token is embedded for the next
  kSample,            // the same with a token drawn by temperature, top-k, top-p and min-p
  kSampleEverything,  // the same with penalties, bias, masks and log-probabilities too
  // Nodes of one draft instead of sequences, all with logits: any tree, or a chain with the bits of single steps.
  kVerify,
  kVerifyExactly,
};

// Everything that shapes a recorded step: one graph each.
struct StepKey {
  int batch = 1;  // sequences, or the draft's class of nodes
  StepTail tail = StepTail::kLogits;
  unsigned adapted = 0;  // linear_bit of the linear layers that look for each sequence's adapter; 0: no adapter in use
  int splits = kernels::kMinDecodeSplits;  // of attention, as the longest sequence needs them

  auto operator<=>(const StepKey&) const = default;
};

// Not thread-safe. After a CudaError it cannot be used any more: every call throws that error again.
class Decoder {
 public:
  // Takes all device memory, as planned. Throws std::invalid_argument for what the kernels cannot do.
  explicit Decoder(DecoderConfig config);
  ~Decoder();
  Decoder(const Decoder&) = delete;
  Decoder& operator=(const Decoder&) = delete;

  const DecoderConfig& config() const noexcept { return config_; }
  const MemoryPlan& plan() const noexcept { return arena_.plan(); }
  // Why prefill runs without cuBLASLt; empty when it has it.
  const std::string& products_reason() const noexcept { return products_reason_; }
  // Whether prefill multiplies in FP8: fp8 layers, fp8_prefill and a GPU and library that can.
  bool has_fp8_products() const noexcept { return fp8_products_; }

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

  // Computes all sequences; returns how many rows of logits() are theirs, in the batch's order. Waits.
  int step(std::span<const SequenceStep> batch);
  // (num_logit_rows, vocab) fp32 in pinned host memory; the address changes only when a step needs more rows than any
  // before it and than there are slots.
  const float* logits() const noexcept { return host_logits_.as<float>(); }
  int num_logit_rows() const noexcept { return num_logit_rows_; }

  // Computes a draft whose nodes follow the prefix of `position` tokens, parents before their children (a root has -1;
  // no parents: a chain). Node i's key and value are at cache position `position` + i until accept_path, and its row of
  // logits() sees the prefix, its ancestors and itself. At most max_verify_tokens nodes; returns their number. Waits.
  int verify_tree(int slot, int position, std::span<const std::int32_t> token_ids,
                  std::span<const std::int32_t> parents, int adapter = 0);
  // Keeps a path of the draft just verified, as node indices from a root down: their keys and values move to positions
  // `position`, `position` + 1, … and the slot is linear again.
  void accept_path(int slot, int position, std::span<const std::int32_t> nodes);
  // Milliseconds on the device of each of `num_steps` verifications of a chain, without the copy of its logits.
  std::vector<float> time_verify(int slot, int position, int num_tokens, int num_steps);

  // The fast path: starts a run in which every sampled token feeds the next step on the device. At most kMaxBatch
  // sequences. A step() or verify_tree() ends it: what was launched can still be read, and no more be launched.
  void start_run(std::span<const RunSequence> sequences);
  // Launches one more step; never waits, except when the host is kHistoryLength steps behind.
  void launch_run_step_async();
  // Waits for the oldest step that was launched and not yet read.
  RunStep read_run_step();
  // Which tokens sequence `index` of the run may draw from the next launch on: bit i of (vocab + 31) / 32 words. Only
  // for a sequence whose row has use_mask, and when every step launched was read. All are allowed until the first call.
  void set_run_mask_async(int index, std::span<const std::uint32_t> words);
  // start_run, then num_steps steps, reading one behind: tokens[step * batch + sequence]. rows: one a sequence, or
  // empty for greedy; their penalties start from nothing. adapters: one a sequence, or empty for none.
  std::vector<std::int32_t> decode_tokens(std::span<const std::int32_t> slots, std::span<const std::int32_t> positions,
                                          std::span<const std::int32_t> token_ids, int num_steps,
                                          std::span<const kernels::SamplingRow> rows,
                                          std::span<const std::int32_t> adapters = {});
  // Milliseconds of each of `num_steps` greedy steps at the given state, measured on the device.
  std::vector<float> time_run(std::span<const std::int32_t> slots, std::span<const std::int32_t> positions,
                              std::span<const std::int32_t> token_ids, int num_steps,
                              std::span<const kernels::SamplingRow> rows, std::span<const std::int32_t> adapters = {});

  void copy_prefix(int source, int target, int length);
  void save_prefix(int slot, int length, std::byte* host);
  void load_prefix(int slot, int length, const std::byte* host);

  // Tile configurations that a decode product (a linear layer's stem, or "head") can have at a batch size.
  int num_tiles(const std::string& product, int batch) const;
  // Chooses one, -1 for the kernel's own choice, and drops the graphs of that batch size. With batch_invariant it is
  // for every batch size: all must sum in the same order.
  void set_tile(const std::string& product, int batch, int tile);
  // Replays graphs (true) or launches the kernels one by one (false); for measuring.
  void use_graphs(bool use) noexcept { use_graphs_ = use; }

 private:
  template <typename Body>
  auto guarded(Body&& body);

  kernels::GemvArgs gemv_args(const LinearView& linear, const char* product, int num_tokens) const;
  // Records one step on the stream: what a graph captures.
  void record_step_async(const StepKey& key);
  kernels::GemvArgs head_args(int num_rows, bool with_maximum) const;
  int num_head_blocks(int batch) const;
  // Of a linear layer's stem, or "head".
  kernels::GemvArgs product_args(const std::string& product, int batch) const;
  void record_head_async(int num_rows, const __nv_bfloat16* x, bool with_maximum, bool pdl);
  void run_step_async(const StepKey& key);
  const Graph& graph(const StepKey& key);
  // What a step launches for a sequence of `length` tokens: the fewest or, so that graphs are few, the most there are.
  int splits_for(int length) const;

  // What the rows of a run need at a step's end; throws std::invalid_argument for what the run cannot draw.
  StepTail sampling_class(std::span<const RunSequence> sequences) const;
  void reserve_sampling();  // pinned memory, at load
  void clear_sampling_async();
  void upload_sampling_async(std::span<const RunSequence> sequences, StepTail tail);
  void record_sampling_async(int batch, bool everything, const kernels::DecodeState& state, bool pdl);

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

  void decode_async(std::span<const SequenceStep> batch, std::span<const int> members, std::span<const int> rows);
  // Whether a step of several tokens verifies a draft: it asks for every token's logits, and is short.
  bool verifies(const SequenceStep& item) const;
  void upload_verify_inputs_async(const VerifyInputs& inputs);
  StepKey prepare_verify_async(int slot, int position, std::span<const std::int32_t> token_ids,
                               std::span<const std::int32_t> parents, int adapter);
  void verify_async(int slot, int position, std::span<const std::int32_t> token_ids,
                    std::span<const std::int32_t> parents, int first_row, int adapter);
  void record_verify_attention_async(int layer, const StepKey& key, bool pdl);
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
  void prefill_chunk_async(int slot, std::span<const std::int32_t> token_ids, int position, int num_logits,
                           int first_row, bool products, int adapter);
  void prefill_layer_async(int layer, int num_tokens, bool products, int adapter);
  // Sets products_ up and chooses its algorithms, on memory whose contents are lost.
  void prepare_products();
  // Whether a prompt's product takes x_fp8; `products` and `adapter` as in prefill_layer_async.
  bool multiplies_fp8(const LinearView& linear, bool products, int adapter) const;
  // Returns whether the next kernel may be launched with programmatic dependent launch.
  bool product_async(const LinearView& linear, bool gate_up, const __nv_bfloat16* x, __nv_bfloat16* y, int num_tokens);
  // Rounds x, (num_tokens, width), to x_fp8 with x_scales.
  void quantize_x_async(const __nv_bfloat16* x, int num_tokens, int width);
  void fp8_product_async(const LinearView& linear, __nv_bfloat16* y, int num_tokens);
  void gemv_rows_async(const LinearView& linear, const __nv_bfloat16* x, __nv_bfloat16* y, int num_tokens,
                       int out_width, kernels::Epilogue epilogue, int layer, Linear which, int adapter);

  // Room for `count` ints in the pinned inputs; waits for the stream when it is full.
  std::int32_t* take_inputs(std::size_t count);
  void reserve_logits(int num_rows);

  DecoderConfig config_;
  int num_sms_ = 0;
  bool pdl_ = false;
  int most_splits_ = 0;     // of attention, for a sequence of any length
  int longest_splits_ = 0;  // for a full slot
  Arena arena_;
  Stream stream_;
  Weights weights_;
  KvCache cache_;
  Adapters adapters_;
  std::unique_ptr<MatrixProducts> products_;
  std::string products_reason_;
  bool fp8_products_ = false;
  Stream side_stream_;  // of every second part of a dequantised product
  Event fork_;
  Event join_;
  // The tile that set_tile chose for a product at a number of tokens (0: at any), of layers stored in this format.
  struct Tile {
    kernels::WeightFormat format = kernels::WeightFormat::bf16;
    int index = -1;
  };
  std::map<std::pair<std::string, int>, Tile> tiles_;
  std::map<StepKey, Graph> graphs_;
  bool use_graphs_ = true;
  bool ready_ = false;
  std::string failure_;  // the CudaError after which nothing works any more

  PinnedBuffer host_inputs_;
  std::size_t inputs_used_ = 0;  // ints
  PinnedBuffer host_logits_;
  int num_logit_rows_ = 0;
  PinnedBuffer host_history_;  // (batch, kHistoryLength), written by the device
  PinnedBuffer host_sampling_rows_;
  PinnedBuffer host_seen_;      // (kMaxBatch, capacity) prompt and answer of sequences with a penalty
  PinnedBuffer host_bias_;      // (kMaxBatch, kMaxBias) ids, then as many values
  PinnedBuffer host_mask_;      // (kMaxBatch, words)
  PinnedBuffer host_logprobs_;  // (kMaxBatch, kHistoryLength), written by the device
  std::array<kernels::SamplingRow, kMaxBatch> run_rows_{};
  std::array<std::int32_t, kMaxBatch> run_tokens_{};  // of the step read last
  std::vector<Event> run_events_;                     // one a history entry
  StepKey run_key_;
  std::int64_t run_launched_ = 0;
  std::int64_t run_read_ = 0;
  std::int64_t run_limit_ = 0;  // steps until a slot is full
};

}  // namespace edgellm
