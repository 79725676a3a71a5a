// Decoding without its forward step: single tokens as one CUDA graph, tokens drawn on the device that feed the next
// step, what the host reads one step behind. What computes logits is a subclass's: Decoder's own kernels, or an engine.
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

#include "edgellm/arena.hpp"
#include "edgellm/decoder_config.hpp"
#include "edgellm/device_guard.hpp"
#include "edgellm/graph.hpp"
#include "edgellm/kernels/attention_decode.hpp"
#include "edgellm/kernels/sampling.hpp"
#include "edgellm/kv_cache.hpp"
#include "edgellm/memory.hpp"
#include "edgellm/run.hpp"
#include "edgellm/stream.hpp"
#include "edgellm/verify_inputs.hpp"

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
  int most_attended = kernels::kContextClasses[0];  // by the longest sequence, as TokenLoop::context_class has it
  int layout = 0;  // of an engine: which slots and adapters the sequences have, as it numbers them

  auto operator<=>(const StepKey&) const = default;
};

// Not thread-safe. After a CudaError it cannot be used any more: every call throws that error again.
class TokenLoop {
 public:
  virtual ~TokenLoop();
  TokenLoop(const TokenLoop&) = delete;
  TokenLoop& operator=(const TokenLoop&) = delete;

  const DecoderConfig& config() const noexcept { return config_; }
  const MemoryPlan& plan() const noexcept { return arena_.plan(); }

  // Computes all sequences; returns how many rows of logits() are theirs, in the batch's order. Waits.
  int step(std::span<const SequenceStep> batch);
  // (num_logit_rows, vocab) fp32 in pinned host memory; the address changes only when a step needs more rows than any
  // before it and than there are slots.
  const float* logits() const noexcept { return host_logits_->as<float>(); }
  // What keeps that address valid.
  std::shared_ptr<const PinnedBuffer> logits_memory() const noexcept { return host_logits_; }
  int num_logit_rows() const noexcept { return num_logit_rows_; }

  // Computes a draft whose nodes follow the prefix of `position` tokens, parents before their children (a root has -1;
  // no parents: a chain). Node i's key and value are at cache position `position` + i until accept_path, and its row of
  // logits() sees the prefix, its ancestors and itself. At most max_verify_tokens nodes; returns their number. Waits.
  int verify_tree(int slot, int position, std::span<const std::int32_t> token_ids,
                  std::span<const std::int32_t> parents, int adapter = 0);
  // Keeps a path of the draft just verified, as node indices from a root down: their keys and values move to positions
  // `position`, `position` + 1, … and the slot is linear again.
  void accept_path(int slot, int position, std::span<const std::int32_t> nodes);

  // The fast path: starts a run in which every sampled token feeds the next step on the device. At most kMaxBatch
  // sequences. A step() ends it: what was launched can still be read, and no more be launched.
  void start_run(std::span<const RunSequence> sequences);
  // Launches one more step; never waits, except when the host is kHistoryLength steps behind.
  void launch_run_step_async();
  // Waits for the oldest step that was launched and not yet read.
  RunStep read_run_step();
  // Which tokens sequence `index` of the run may draw from the next launch on: bit i of (num_rows + 31) / 32 words.
  // Only for a sequence whose row has use_mask, and when every step launched was read. All are allowed until the first
  // call.
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

  // The first `length` tokens' keys and values, from slot to slot, and to and from the host. All throw
  // std::invalid_argument for what lies in no slot.
  void copy_prefix(int source, int target, int length);
  void save_prefix(int slot, int length, std::byte* host);
  void load_prefix(int slot, int length, const std::byte* host);
  void check_prefix(int slot, int length) const;

  // Replays graphs (true) or launches the kernels one by one (false); for measuring.
  void use_graphs(bool use) noexcept { use_graphs_ = use; }
  // Makes the decoder's GPU the calling thread's for good.
  void make_current() const { EDGELLM_CUDA_TRY(cudaSetDevice(device_)); }

 protected:
  // Takes all device memory, as planned; the plan has what plan_token_loop adds.
  TokenLoop(DecoderConfig config, MemoryPlan plan);

  // Throws std::invalid_argument for an adapter that is not loaded.
  virtual void check_adapter(int adapter) const = 0;
  // Makes ready for steps of one token in each of these slots with these adapters: all of the key but tail and
  // most_attended.
  virtual StepKey arrange_async(std::span<const std::int32_t> slots, std::span<const std::int32_t> adapters) = 0;
  // The most tokens of a longest sequence for which the same step is launched as for `length`: few, as graphs are.
  virtual int context_class(int length) const = 0;
  // Before a key's graph is captured, on the state that its first replay will find.
  virtual void prepare_capture_async(const StepKey&) {}
  // Records one step on the stream: what a graph captures. Reads decode_inputs and, unless the tail is kLogits, the
  // embeddings in residual; ends with logits at step_logits(key) or, by record_sampling_async, with the next tokens.
  virtual void record_step_async(const StepKey& key) = 0;
  // (batch, vocab) fp32, device.
  virtual float* step_logits(const StepKey&) const { return arena_.get<float>("logits"); }
  // One sequence of several tokens; its rows of logits go to host_logits_ from `first_row` on.
  virtual void several_async(const SequenceStep& item, int first_row) = 0;
  // A draft, as verify_tree has checked it; its rows of logits go to host_logits_ from `first_row` on.
  virtual void verify_async(int slot, int position, std::span<const std::int32_t> token_ids,
                            std::span<const std::int32_t> parents, int first_row, int adapter) = 0;
  virtual const KvCache& cache() const = 0;
  virtual const kernels::WeightView& embedding() const = 0;
  virtual const std::int32_t* row_tokens() const { return nullptr; }  // DecodeState::row_tokens
  virtual void copy_prefix_async(int source, int target, int length) = 0;
  virtual void save_prefix_async(int slot, int length, std::byte* host) = 0;
  virtual void load_prefix_async(int slot, int length, const std::byte* host) = 0;

  template <typename Body>
  auto guarded(Body&& body);
  void run_step_async(const StepKey& key);
  const Graph& graph(const StepKey& key);
  // What the rows of a run need at a step's end; throws std::invalid_argument for what the run cannot draw. A subclass
  // without a greedy tail of its own says so.
  virtual StepTail sampling_class(std::span<const RunSequence> sequences) const;
  kernels::DecodeState decode_state() const;
  void record_sampling_async(const StepKey& key, bool pdl);
  // Room for `count` ints in the pinned inputs; waits for the stream when it is full.
  std::int32_t* take_inputs(std::size_t count);
  void reserve_logits(int num_rows);
  // For a call: throws std::invalid_argument where the host has no memory for so many, and then nothing has changed.
  void reserve_logits_of_call(int num_rows);
  // Until what a run was started with, and launched, has read its inputs.
  void wait_for_run();
  // A step ends the run: what was launched can still be read, and no more be launched.
  void end_run();
  // To what the plan calls verify_inputs.
  void upload_verify_inputs_async(const VerifyInputs& inputs);
  // Copies `count` rows of logits on the device to the host's rows from `first_row` on.
  void copy_logits_async(const float* rows, std::size_t first_row, std::size_t count);

  const int device_ = current_device();  // of all calls, whichever the calling thread has
  DecoderConfig config_;
  bool pdl_ = false;
  Arena arena_;
  Stream stream_;
  std::map<StepKey, Graph> graphs_;
  PinnedBuffer host_inputs_;
  std::size_t inputs_used_ = 0;                // ints
  std::shared_ptr<PinnedBuffer> host_logits_;  // shared with the arrays that show its rows

 private:
  void decode_async(std::span<const SequenceStep> batch, std::span<const int> members, std::span<const int> rows);
  void reserve_sampling();  // pinned memory, at load
  void clear_sampling_async();
  void upload_sampling_async(std::span<const RunSequence> sequences, StepTail tail);

  bool use_graphs_ = true;
  std::string failure_;  // the CudaError after which nothing works any more
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

// Runs `body`; the first CudaError is remembered and thrown again by every later call: the device's state is unknown.
template <typename Body>
auto TokenLoop::guarded(Body&& body) {
  if (!failure_.empty()) throw CudaError(cudaErrorUnknown, "the decoder failed earlier: " + failure_);
  try {
    const DeviceGuard guard(device_);
    return std::forward<Body>(body)();
  } catch (const CudaError& error) {
    failure_ = error.what();
    throw;
  }
}

}  // namespace edgellm
