// The fast path: the device feeds itself, the host only launches and reads one step behind.
#include <algorithm>
#include <limits>
#include <stdexcept>
#include <string>

#include "edgellm/cuda_try.hpp"
#include "edgellm/kernels/embedding.hpp"
#include "edgellm/token_loop.hpp"

namespace edgellm {
namespace {

// A run of rows alone: penalties start from nothing.
std::vector<RunSequence> run_sequences(std::span<const std::int32_t> slots, std::span<const std::int32_t> positions,
                                       std::span<const std::int32_t> token_ids,
                                       std::span<const kernels::SamplingRow> rows,
                                       std::span<const std::int32_t> adapters) {
  const std::size_t batch = slots.size();
  if (positions.size() != batch || token_ids.size() != batch || (!rows.empty() && rows.size() != batch) ||
      (!adapters.empty() && adapters.size() != batch)) {
    throw std::invalid_argument("a run needs a position, a token and, where given, a row and an adapter for each slot");
  }
  std::vector<RunSequence> sequences(batch);
  for (std::size_t i = 0; i < batch; ++i) {
    sequences[i].slot = slots[i];
    sequences[i].position = positions[i];
    sequences[i].token_id = token_ids[i];
    sequences[i].adapter = adapters.empty() ? 0 : adapters[i];
    sequences[i].row = rows.empty() ? kernels::SamplingRow{} : rows[i];
    if (rows.empty()) sequences[i].row.num_top = -1, sequences[i].row.repetition_penalty = 1.0F;
  }
  return sequences;
}

}  // namespace

void TokenLoop::start_run(std::span<const RunSequence> sequences) {
  const std::size_t batch = sequences.size();
  if (batch < 1 || batch > kMaxBatch) {
    throw std::invalid_argument("a run takes 1 to " + std::to_string(kMaxBatch) + " sequences, not " +
                                std::to_string(batch));
  }
  std::int64_t limit = std::numeric_limits<std::int64_t>::max();
  for (const RunSequence& sequence : sequences) {
    if (sequence.slot < 0 || sequence.slot >= config_.num_slots || sequence.position < 0 ||
        sequence.position >= config_.capacity) {
      throw std::invalid_argument("a run does not fit its slot");
    }
    limit = std::min<std::int64_t>(limit, config_.capacity - sequence.position);
  }
  const StepTail tail = sampling_class(sequences);  // checks the rest
  std::array<std::int32_t, kMaxBatch> adapters{};
  for (std::size_t i = 0; i < batch; ++i) adapters[i] = sequences[i].adapter;
  for (const std::int32_t adapter : adapters) check_adapter(adapter);
  StepKey key;
  guarded([&] {
    cudaStream_t stream = stream_.get();
    stream_.wait();  // the pinned inputs of an earlier run may still be read
    inputs_used_ = 0;
    std::int32_t* inputs = take_inputs(3 * kMaxBatch);
    std::fill_n(inputs, 3 * kMaxBatch, 0);
    for (std::size_t i = 0; i < batch; ++i) {
      inputs[i] = sequences[i].token_id;
      inputs[kMaxBatch + i] = sequences[i].position;
      inputs[2 * kMaxBatch + i] = sequences[i].slot;
    }
    auto* device_inputs = arena_.get<std::int32_t>("decode_inputs");
    EDGELLM_CUDA_TRY(
        cudaMemcpyAsync(device_inputs, inputs, 3 * kMaxBatch * sizeof(std::int32_t), cudaMemcpyHostToDevice, stream));
    key = arrange_async(std::span(inputs + 2 * kMaxBatch, batch), adapters);
    EDGELLM_CUDA_TRY(
        cudaMemsetAsync(arena_.get<std::int32_t>("step_counts"), 0, kMaxBatch * sizeof(std::int32_t), stream));
    if (tail != StepTail::kGreedy) upload_sampling_async(sequences, tail);
    kernels::embedding_async(embedding(), device_inputs, static_cast<int>(batch), config_.embed_scale,
                             arena_.get<float>("residual"), arena_.get<__nv_bfloat16>("residual_bf16"), stream, false);
  });
  for (std::size_t i = 0; i < batch; ++i) run_rows_[i] = sequences[i].row;
  run_key_ = key;
  run_key_.tail = tail;
  run_limit_ = limit;
  run_launched_ = 0;
  run_read_ = 0;
}

void TokenLoop::launch_run_step_async() {
  if (run_launched_ >= run_limit_) {
    throw std::invalid_argument("a slot of the run is full, or a step outside the run has ended it; start another");
  }
  if (run_launched_ - run_read_ >= kHistoryLength) throw std::logic_error("the run's history is full; read it first");
  // The longest sequence is the one whose slot is full first.
  run_key_.most_attended = context_class(static_cast<int>(config_.capacity - run_limit_ + run_launched_ + 1));
  guarded([&] {
    run_step_async(run_key_);
    run_events_[static_cast<std::size_t>(run_launched_ % kHistoryLength)].record(stream_.get());
  });
  ++run_launched_;
}

RunStep TokenLoop::read_run_step() {
  if (run_read_ >= run_launched_) throw std::logic_error("no step of the run is under way");
  const auto index = static_cast<std::size_t>(run_read_ % kHistoryLength);
  guarded([&] { run_events_[index].wait(); });
  ++run_read_;
  const auto* history = host_history_.as<std::int32_t>();
  const auto* logprobs = host_logprobs_.as<kernels::TokenLogprobs>();
  const auto batch = static_cast<std::size_t>(run_key_.batch);
  RunStep step;
  for (std::size_t i = 0; i < batch; ++i) {
    const std::size_t at = i * kHistoryLength + index;
    run_tokens_[i] = history[at];
    const bool wanted = run_key_.tail == StepTail::kSampleEverything && run_rows_[i].num_top >= 0;
    if (wanted && history[at] >= 0) step.logprobs[i] = logprobs + at;
  }
  step.tokens = std::span(run_tokens_).first(batch);
  return step;
}

std::vector<std::int32_t> TokenLoop::decode_tokens(std::span<const std::int32_t> slots,
                                                   std::span<const std::int32_t> positions,
                                                   std::span<const std::int32_t> token_ids, int num_steps,
                                                   std::span<const kernels::SamplingRow> rows,
                                                   std::span<const std::int32_t> adapters) {
  start_run(run_sequences(slots, positions, token_ids, rows, adapters));
  std::vector<std::int32_t> tokens;
  tokens.reserve(static_cast<std::size_t>(std::max(num_steps, 0)) * slots.size());
  for (int i = 0; i <= num_steps; ++i) {
    if (i < num_steps) launch_run_step_async();
    if (i == 0) continue;
    const std::span<const std::int32_t> step = read_run_step().tokens;
    tokens.insert(tokens.end(), step.begin(), step.end());
  }
  return tokens;
}

std::vector<float> TokenLoop::time_run(std::span<const std::int32_t> slots, std::span<const std::int32_t> positions,
                                       std::span<const std::int32_t> token_ids, int num_steps,
                                       std::span<const kernels::SamplingRow> rows,
                                       std::span<const std::int32_t> adapters) {
  if (num_steps < 1) throw std::invalid_argument("num_steps " + std::to_string(num_steps) + " is not at least 1");
  start_run(run_sequences(slots, positions, token_ids, rows, adapters));
  std::vector<float> times;
  guarded([&] {
    std::vector<Event> marks;
    for (int i = 0; i <= num_steps; ++i) marks.emplace_back(true);
    marks.front().record(stream_.get());
    for (int i = 0; i < num_steps; ++i) {
      launch_run_step_async();
      marks[static_cast<std::size_t>(i) + 1].record(stream_.get());
      if (i > 0) (void)read_run_step();
    }
    stream_.wait();
    for (int i = 0; i < num_steps; ++i) {
      times.push_back(marks[static_cast<std::size_t>(i) + 1].elapsed_ms(marks[static_cast<std::size_t>(i)]));
    }
  });
  run_read_ = run_launched_;
  return times;
}

}  // namespace edgellm
