// The decode loop over a TensorRT engine: what Decoder computes with kernels, an engine's contexts compute here.
#pragma once

#include <algorithm>
#include <cstdint>
#include <map>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "edgellm/kernels/engine_inputs.hpp"
#include "edgellm/kv_cache.hpp"
#include "edgellm/token_loop.hpp"
#include "edgellm/trt_engine.hpp"
#include "edgellm/weights.hpp"

namespace edgellm {

// An input or output of the engine, as edgellm_ros/executors/contract.py lists them.
enum class TrtRole : std::uint8_t {
  embeds,
  positions,
  write_indices,
  logit_indices,
  logits,
  past_key,
  past_value,
  present_key,
  present_value,
  lora_a,
  lora_b,
  past_kv,  // of an engine with plugins: keys and values of a layer as one tensor
  present_kv,
  mask,        // of an engine that takes trees: what attention adds to its scores, one for each window
  tree_masks,  // of one with plugins: which of the new tokens each of them sees, as bits
};
TrtRole trt_role_from_name(const std::string& name);  // throws std::invalid_argument

struct TrtTensor {
  std::string name;
  TrtRole role = TrtRole::embeds;
  int layer = -1;
  std::vector<std::int64_t> dims;  // -1 varies
  int max_rank = 0;                // of an adapter's tensor: the largest R of the engine's profiles
  int window = 0;                  // of a mask
};

struct TrtDecoderConfig {
  // Sizes of the model, the cache's format (what the engine computes in or, with plugins, fp8), the embedding's format
  // (bf16, fp16 or int8), slots, adapters; capacity is what a slot may hold and max_tokens the most of one enqueue;
  // max_verify_tokens the nodes of a tree, which the engine has to take, or 0.
  DecoderConfig loop;
  bool is_bf16 = false;     // what the engine computes in; else fp16
  int engine_capacity = 0;  // of the engine's cache; one more than loop.capacity, or more, where slots are batched
  int max_batch = 1;        // slots of one enqueue; 1: each sequence alone, so that its results depend on nothing else
  int decode_tokens = 1;    // most tokens of a sequence in the first profile
  int max_logits = 1;       // rows of logits of one enqueue, in every profile
  std::vector<TrtTensor> tensors;

  // Throws std::invalid_argument that names what cannot be.
  void check() const;
  int rows_per_group() const;
  KvOrder kv_order() const;
  std::size_t adapter_bytes() const;  // of one
  std::vector<int> mask_windows() const;
  bool has(TrtRole role) const;
};

// Bytes from one tensor to the next: TensorRT wants addresses in multiples of 256.
constexpr std::size_t trt_stride(std::size_t size) {
  return (size + MemoryPlan::kAlignment - 1) / MemoryPlan::kAlignment * MemoryPlan::kAlignment;
}

// context_bytes: TrtEngine::context_bytes. Beside it TensorRT has the engine's weights.
MemoryPlan plan_trt_memory(const TrtDecoderConfig& config, std::size_t context_bytes);

// One adapter's A or B of one linear layer, in host memory in what the engine computes in; empty tensors are not given.
struct TrtLoraTensor {
  std::string name;
  int rank = 0;
  std::span<const std::byte> data;
};

class TrtDecoder final : public TokenLoop {
 public:
  // Takes all memory but TensorRT's own. `engine` must have been compared with the contract, and outlive this.
  TrtDecoder(TrtEngine& engine, TrtDecoderConfig config);
  ~TrtDecoder() override;

  // As the configuration's embedding_format says; scale (rows, cols / group) fp16 for int8, else null.
  void load_embedding(const HostTensor& values, const HostTensor* scale);
  void load_vocab_map(const HostTensor& token_ids);  // (head_rows) int32, of a cut head
  // Runs each profile and kernel once, and captures the graphs of each slot alone.
  void finish_load();

  // Puts an adapter into place `index` of 1 to max_adapters. Throws std::invalid_argument, and changes nothing, for
  // what does not fit.
  void load_adapter(int index, std::span<const TrtLoraTensor> tensors);
  void unload_adapter(int index);

  // Contexts and graphs that there are, for tests.
  std::pair<std::size_t, std::size_t> num_contexts_and_graphs() const { return {contexts_.size(), graphs_.size()}; }

 private:
  // Sequences that one enqueue computes: those of `members`, in slots of a contiguous range.
  struct Group {
    int first_slot = 0;
    int num_rows = 1;
    int adapter = 0;
    std::uint32_t members = 0;  // bit i: sequence i of the step

    auto operator<=>(const Group&) const = default;
    int num_logits() const;
  };
  using Layout = std::vector<Group>;
  // What a context is bound to; a graph holds these addresses and shapes.
  struct ContextKey {
    int first_slot = 0;
    int num_rows = 1;
    int num_logits = 1;
    int adapter = 0;
    int length = 1;  // tokens of each; more than one: a draft's

    auto operator<=>(const ContextKey&) const = default;
  };
  struct Lora {
    bool loaded = false;
    std::map<std::string, int> ranks;  // of tensors that are not empty
  };

  void check_adapter(int adapter) const override;
  StepKey arrange_async(std::span<const std::int32_t> slots, std::span<const std::int32_t> adapters) override;
  int context_class(int) const override { return 0; }
  void prepare_capture_async(const StepKey& key) override;
  void record_step_async(const StepKey& key) override;
  float* step_logits(const StepKey& key) const override;
  void several_async(const SequenceStep& item, int first_row) override;
  void verify_async(int slot, int position, std::span<const std::int32_t> token_ids,
                    std::span<const std::int32_t> parents, int first_row, int adapter) override;
  const KvCache& cache() const override { return cache_; }
  StepTail sampling_class(std::span<const RunSequence> sequences) const override;
  const kernels::WeightView& embedding() const override { return embedding_; }
  const std::int32_t* row_tokens() const override;
  void copy_prefix_async(int source, int target, int length) override;
  void save_prefix_async(int slot, int length, std::byte* host) override;
  void load_prefix_async(int slot, int length, const std::byte* host) override;

  const Layout& layout(const StepKey& key) const { return layouts_[static_cast<std::size_t>(key.layout)]; }
  static ContextKey context_key(const Group& group);
  // Of a draft that is verified by a graph.
  ContextKey verify_context_key(const StepKey& key) const;
  void record_verify_async(const StepKey& key);
  // Most nodes of a draft that a decode step of the engine takes.
  int most_nodes() const { return std::min({trt_.decode_tokens, trt_.max_logits, kMaxVerifyTokens}); }
  void record_group_async(const Group& group, int batch);
  // Where an enqueue has its inputs; masks in the order of mask_windows.
  struct Inputs {
    kernels::EngineInputs each;
    std::vector<std::byte*> masks;
  };
  // Of a group of slots from `first_slot` on, and its rows of logits.
  Inputs group_inputs(int first_slot) const;
  float* group_logits(int first_slot) const;
  TrtContext make_context(const ContextKey& key);
  // Of several tokens of one sequence.
  Inputs chunk_inputs() const;
  // tree: of its nodes, in device memory; null: each token sees those before it.
  void record_masks_async(const Inputs& inputs, int num_tokens, const VerifyInputs* tree = nullptr);
  void bind(TrtContext& context, const Inputs& inputs, float* logits, const ContextKey& key, int length);
  std::byte* lora_address(int adapter, std::size_t tensor) const;
  int lora_rank(int adapter, const TrtTensor& tensor) const;
  // is_tree: verify_inputs has the depths and masks of these tokens.
  void chunk_async(const SequenceStep& item, int start, int count, int num_logits, int first_row, int profile,
                   bool is_tree = false);
  void warm_up();
  // Of the contexts, and so of the graphs, those that are bound to adapter `index`; -1: all.
  void forget(int adapter);

  TrtEngine& engine_;
  TrtDecoderConfig trt_;
  KvCache cache_;
  std::vector<int> windows_;  // that have a mask of their own as an input
  kernels::WeightView embedding_;
  TrtContext chunk_context_;
  std::map<ContextKey, TrtContext> contexts_;
  std::vector<Layout> layouts_;
  std::map<Layout, int> layout_numbers_;
  std::vector<Lora> loras_;                // place 0 is none
  std::vector<std::size_t> lora_offsets_;  // of each tensor in a place; those that are no adapter's have none
  bool has_embedding_ = false;
  bool has_vocab_map_ = false;
};

}  // namespace edgellm
