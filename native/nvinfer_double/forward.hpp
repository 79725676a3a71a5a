// The decoder behind the double's enqueueV3: the project's kernels over the tensors that the caller bound.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "edgellm/adapters.hpp"
#include "edgellm/arena.hpp"
#include "edgellm/kernels/attention_tree.hpp"
#include "edgellm/kernels/gemv.hpp"
#include "edgellm/weights.hpp"
#include "plan.hpp"

namespace edgellm::nvinfer_double {

constexpr int kMostTreeTokens = kernels::kMaxTreeTokens;

struct BoundLora {
  const void* a = nullptr;  // (in, rank)
  const void* b = nullptr;  // (rank, out)
  int rank = 0;             // 0: no adapter
};

// Of an engine that takes trees: what a token adds to its scores, for the layers with this window.
struct BoundMask {
  int window = 0;
  const void* data = nullptr;  // (batch, 1, length, capacity)
};

// What one enqueue has: device memory, and sizes that were set as shapes. Floats are fp16 or bf16, as the plan says.
struct BoundTensors {
  int batch = 0;
  int length = 0;  // tokens a sequence, padding included
  int num_logits = 0;
  const void* embeds = nullptr;                 // (batch, length, hidden)
  const std::int64_t* positions = nullptr;      // (batch, length)
  const std::int64_t* write_indices = nullptr;  // (batch)
  const std::int64_t* logit_indices = nullptr;  // (num_logits)
  float* logits = nullptr;                      // (num_logits, rows of the head)
  std::vector<void*> keys;  // a layer's, slot by slot (kv_heads, capacity, head_dim), read and written
  std::vector<void*> values;
  bool together = false;  // a slot's values follow its keys: (batch, 2, kv_heads, capacity, head_dim)
  std::vector<std::array<BoundLora, kNumLinears>> loras;  // one a layer, or none
  std::vector<BoundMask> masks;
  const std::int64_t* tree_masks = nullptr;  // (batch, length), of an engine that has bits in place of masks

  bool is_tree() const { return (!masks.empty() || tree_masks != nullptr) && length > 1 && length <= kMostTreeTokens; }
};

// The largest sizes that a profile allows, and so the workspace that an enqueue with it may need.
struct Limits {
  int batch = 0;
  int tokens = 0;  // batch * length
  int length = 0;
  int num_logits = 0;
  int lora_rank = 0;
  bool trees = false;
};

std::vector<int> windows_of(const DecoderConfig& config);  // of its layers, each once
// No GPU is needed for these two. Throws std::invalid_argument for a profile that the kernels cannot have.
Limits limits_of(const Plan& plan, const Profile& profile);
MemoryPlan plan_workspace(const DecoderConfig& config, const Limits& limits);

class Forward {
 public:
  // Takes memory for the weights and uploads them. Throws CudaError, and std::invalid_argument for weights that are
  // not the decoder's.
  explicit Forward(const Plan& plan);

  // Launches everything on `stream`: no waiting, no allocation, so that it can be captured. memory: as planned, all of
  // which is overwritten.
  void enqueue_async(const BoundTensors& bound, const MemoryPlan& workspace, std::byte* memory, cudaStream_t stream);

 private:
  struct Step;
  void layer_async(int index, const Step& step) const;
  void attention_async(int index, const Step& step) const;
  void check_masks_async(const Step& step) const;
  void linear_async(int index, Linear which, kernels::GemvArgs args, int out_width, const Step& step) const;
  void add_async(int index, Linear which, kernels::GemvArgs args, const __nv_bfloat16* norm, const Step& step) const;
  void gemv_async(kernels::GemvArgs args, int num_tokens, int out_width, bool adapted, cudaStream_t stream) const;

  DecoderConfig config_;
  bool is_bf16_;
  Faults faults_;
  Arena arena_;
  Weights weights_;
  DeviceBuffer executions_;
  int most_splits_ = 0;
};

}  // namespace edgellm::nvinfer_double
