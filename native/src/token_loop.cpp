// What every decoder has beside its forward step: inputs, graphs, logits for the host, prefixes.
#include "edgellm/token_loop.hpp"

#include <algorithm>
#include <array>
#include <stdexcept>
#include <string>

#include "device_attribute.hpp"
#include "edgellm/cuda_try.hpp"
#include "edgellm/kernels/types.hpp"
#include "edgellm/verify_inputs.hpp"

namespace edgellm {

TokenLoop::TokenLoop(DecoderConfig config, MemoryPlan plan)
    : config_(std::move(config)),
      pdl_(config_.pdl && device_attribute(cudaDevAttrComputeCapabilityMajor) >= 9),  // a launch asks the code, too
      arena_(std::move(plan)) {
  // Pinned inputs of one step: a full prefill chunk beside decode groups of all slots.
  host_inputs_ = PinnedBuffer((static_cast<std::size_t>(3 * config_.max_tokens + 64) * 2 +
                               static_cast<std::size_t>(4 * (config_.num_slots + kMaxBatch))) *
                                  sizeof(std::int32_t) +
                              4 * sizeof(VerifyInputs));
  host_history_ = PinnedBuffer(static_cast<std::size_t>(kHistoryLength * kMaxBatch) * sizeof(std::int32_t));
  reserve_sampling();
  reserve_logits(std::max({config_.num_slots, kMaxLogitRows, config_.max_verify_tokens}));
  for (int i = 0; i < kHistoryLength; ++i) run_events_.emplace_back();
  for (const char* name : {"decode_inputs", "step_counts"}) {
    EDGELLM_CUDA_TRY(cudaMemsetAsync(arena_.get<std::byte>(name), 0, arena_.plan().size(name), stream_.get()));
  }
  clear_sampling_async();
}

TokenLoop::~TokenLoop() {
  // Kernels may still read the arena, which is about to go.
  EDGELLM_CUDA_WARN(cudaStreamSynchronize(stream_.get()));
}

const Graph& TokenLoop::graph(const StepKey& key) {
  if (!graphs_.contains(key)) prepare_capture_async(key);
  Graph& graph = graphs_[key];
  if (!graph) graph = Graph(stream_.get(), [&] { record_step_async(key); });
  return graph;
}

void TokenLoop::run_step_async(const StepKey& key) {
  if (use_graphs_) {
    graph(key).launch(stream_.get());
  } else {
    prepare_capture_async(key);
    record_step_async(key);
  }
}

int TokenLoop::step(std::span<const SequenceStep> batch) {
  return guarded([&] {
    int num_rows = 0;
    std::vector<int> first_rows;
    std::vector<int> singles;
    for (std::size_t i = 0; i < batch.size(); ++i) {
      const SequenceStep& item = batch[i];
      const auto length = static_cast<int>(item.token_ids.size());
      if (length < 1 || item.slot < 0 || item.slot >= config_.num_slots || item.position < 0 ||
          length > config_.capacity - item.position || item.num_logits < 0 || item.num_logits > length) {
        throw std::invalid_argument("a step does not fit its slot");
      }
      check_adapter(item.adapter);
      first_rows.push_back(num_rows);
      num_rows += item.num_logits;
      if (length == 1) singles.push_back(static_cast<int>(i));
    }
    reserve_logits_of_call(num_rows);  // first: a call that is refused ends no run
    end_run();
    inputs_used_ = 0;
    for (std::size_t start = 0; start < singles.size(); start += kMaxBatch) {
      const std::size_t count = std::min(singles.size() - start, std::size_t{kMaxBatch});
      decode_async(batch, std::span(singles).subspan(start, count), first_rows);
    }
    for (std::size_t i = 0; i < batch.size(); ++i) {
      if (batch[i].token_ids.size() > 1) several_async(batch[i], first_rows[i]);
    }
    stream_.wait();
    return num_rows;
  });
}

void TokenLoop::wait_for_run() {
  // Before its first step even what the run was started with may still be on its way.
  if (run_launched_ == 0 || run_read_ < run_launched_) stream_.wait();
}

void TokenLoop::end_run() {
  wait_for_run();
  run_limit_ = run_launched_;  // it cannot go on without its inputs
}

void TokenLoop::decode_async(std::span<const SequenceStep> batch, std::span<const int> members,
                             std::span<const int> rows) {
  std::int32_t* inputs = take_inputs(3 * kMaxBatch);
  std::array<std::int32_t, kMaxBatch> adapters{};
  int longest = 0;
  for (std::size_t i = 0; i < members.size(); ++i) {
    const SequenceStep& item = batch[static_cast<std::size_t>(members[i])];
    inputs[i] = item.token_ids[0];
    inputs[kMaxBatch + i] = item.position;
    inputs[2 * kMaxBatch + i] = item.slot;
    adapters[i] = item.adapter;
    longest = std::max(longest, item.position + 1);
  }
  EDGELLM_CUDA_TRY(cudaMemcpyAsync(arena_.get<std::int32_t>("decode_inputs"), inputs,
                                   3 * kMaxBatch * sizeof(std::int32_t), cudaMemcpyHostToDevice, stream_.get()));
  StepKey key = arrange_async(std::span(inputs + 2 * kMaxBatch, members.size()), adapters);
  key.tail = StepTail::kLogits;
  key.most_attended = context_class(longest);
  run_step_async(key);
  const float* logits = step_logits(key);
  // Rows that lie together on both sides, the usual case, are one copy.
  for (std::size_t i = 0; i < members.size();) {
    const auto first = static_cast<std::size_t>(members[i]);
    std::size_t count = 0;
    while (i + count < members.size()) {
      const auto index = static_cast<std::size_t>(members[i + count]);
      if (batch[index].num_logits == 0 || rows[index] != rows[first] + static_cast<int>(count)) break;
      ++count;
    }
    if (count > 0) {
      copy_logits_async(logits + i * static_cast<std::size_t>(config_.num_rows()),
                        static_cast<std::size_t>(rows[first]), count);
    }
    i += std::max<std::size_t>(count, 1);
  }
}

void TokenLoop::copy_logits_async(const float* rows, std::size_t first_row, std::size_t count) {
  const auto vocab = static_cast<std::size_t>(config_.num_rows());
  EDGELLM_CUDA_TRY(cudaMemcpyAsync(host_logits_->as<float>() + first_row * vocab, rows, count * vocab * sizeof(float),
                                   cudaMemcpyDeviceToHost, stream_.get()));
}

std::int32_t* TokenLoop::take_inputs(std::size_t count) {
  if ((inputs_used_ + count) * sizeof(std::int32_t) > host_inputs_.size()) {
    stream_.wait();  // copies from the start of the buffer may still be under way
    inputs_used_ = 0;
  }
  std::int32_t* inputs = host_inputs_.as<std::int32_t>() + inputs_used_;
  inputs_used_ += count;
  return inputs;
}

void TokenLoop::reserve_logits(int num_rows) {
  if (num_rows <= num_logit_rows_) return;
  host_logits_ = std::make_shared<PinnedBuffer>(static_cast<std::size_t>(num_rows) *
                                                static_cast<std::size_t>(config_.num_rows()) * sizeof(float));
  num_logit_rows_ = num_rows;
}

void TokenLoop::reserve_logits_of_call(int num_rows) {
  try {
    reserve_logits(num_rows);
  } catch (const CudaError& error) {
    if (error.code() != cudaErrorMemoryAllocation) throw;
    throw std::invalid_argument("the host has no pinned memory for " + std::to_string(num_rows) +
                                " rows of logits; ask for fewer at once");
  }
}

void TokenLoop::check_prefix(int slot, int length) const {
  if (slot >= 0 && slot < config_.num_slots && length >= 0 && length <= config_.capacity) return;
  throw std::invalid_argument("a prefix of " + std::to_string(length) + " tokens in slot " + std::to_string(slot) +
                              " does not fit: there are " + std::to_string(config_.num_slots) + " slots of " +
                              std::to_string(config_.capacity) + " tokens");
}

void TokenLoop::copy_prefix(int source, int target, int length) {
  check_prefix(source, length);
  check_prefix(target, length);
  guarded([&] {
    copy_prefix_async(source, target, length);
    stream_.wait();
  });
}

void TokenLoop::save_prefix(int slot, int length, std::byte* host) {
  check_prefix(slot, length);
  guarded([&] {
    save_prefix_async(slot, length, host);
    stream_.wait();
  });
}

void TokenLoop::load_prefix(int slot, int length, const std::byte* host) {
  check_prefix(slot, length);
  guarded([&] {
    load_prefix_async(slot, length, host);
    stream_.wait();
  });
}

}  // namespace edgellm
