// How a run's tokens are drawn: which kernel a batch needs, what it reads, and its place at the end of a step.
#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <string>

#include "edgellm/cuda_try.hpp"
#include "edgellm/token_loop.hpp"

namespace edgellm {
namespace {

using kernels::SamplingRow;

bool is_penalised(const SamplingRow& row) {
  return row.repetition_penalty != 1.0F || row.presence_penalty != 0.0F || row.frequency_penalty != 0.0F;
}

void check_ids(std::span<const std::int32_t> ids, int vocab, const char* what) {
  for (const std::int32_t id : ids) {
    if (id < 0 || id >= vocab) {
      throw std::invalid_argument(std::string(what) + " has token " + std::to_string(id) +
                                  "; the head's rows are 0 to " + std::to_string(vocab - 1));
    }
  }
}

std::size_t mask_words(int vocab) { return (static_cast<std::size_t>(vocab) + 31) / 32; }

}  // namespace

StepTail TokenLoop::sampling_class(std::span<const RunSequence> sequences) const {
  bool greedy = true;
  bool everything = false;
  for (const RunSequence& sequence : sequences) {
    const SamplingRow& row = sequence.row;
    if (sequence.bias_ids.size() > kMaxBias || sequence.bias_values.size() != sequence.bias_ids.size()) {
      throw std::invalid_argument("a run takes at most " + std::to_string(kMaxBias) +
                                  " bias entries a sequence, each an id and a value");
    }
    if (row.num_top > kernels::kMaxTopLogprobs) {
      throw std::invalid_argument("a run gives at most " + std::to_string(kernels::kMaxTopLogprobs) +
                                  " log-probabilities a token, not " + std::to_string(row.num_top));
    }
    check_ids(sequence.bias_ids, config_.num_rows(), "logit_bias");
    if (is_penalised(row)) {
      check_ids(sequence.prompt_ids, config_.num_rows(), "the prompt");
      check_ids(sequence.answer_ids, config_.num_rows(), "the answer");
      if (sequence.prompt_ids.size() + sequence.answer_ids.size() > static_cast<std::size_t>(config_.capacity)) {
        throw std::invalid_argument("a sequence of the run has more tokens than a slot");
      }
    }
    greedy = greedy && row.temperature <= 0.0F;
    everything = everything || is_penalised(row) || !sequence.bias_ids.empty() || row.use_mask != 0 || row.num_top >= 0;
  }
  if (everything) return StepTail::kSampleEverything;
  return greedy ? StepTail::kGreedy : StepTail::kSample;
}

void TokenLoop::upload_sampling_async(std::span<const RunSequence> sequences, StepTail tail) {
  cudaStream_t stream = stream_.get();
  const bool everything = tail == StepTail::kSampleEverything;
  auto* rows = host_sampling_rows_.as<SamplingRow>();
  for (std::size_t i = 0; i < sequences.size(); ++i) {
    rows[i] = sequences[i].row;
    rows[i].num_bias = everything ? static_cast<std::int32_t>(sequences[i].bias_ids.size()) : 0;
  }
  EDGELLM_CUDA_TRY(cudaMemcpyAsync(arena_.get<SamplingRow>("sampling_rows"), rows,
                                   sequences.size() * sizeof(SamplingRow), cudaMemcpyHostToDevice, stream));
  if (!everything) return;

  const auto vocab = static_cast<std::size_t>(config_.num_rows());
  const std::size_t words = mask_words(config_.num_rows());
  const auto seen_length = static_cast<std::size_t>(config_.capacity);
  for (std::size_t i = 0; i < sequences.size(); ++i) {
    const RunSequence& sequence = sequences[i];
    if (is_penalised(sequence.row)) {
      std::int32_t* host = host_seen_.as<std::int32_t>() + i * seen_length;
      auto* device = arena_.get<std::int32_t>("seen_ids") + i * seen_length;
      auto* counts = arena_.get<std::uint32_t>("token_counts") + i * vocab;
      std::int32_t* end = std::copy(sequence.prompt_ids.begin(), sequence.prompt_ids.end(), host);
      end = std::copy(sequence.answer_ids.begin(), sequence.answer_ids.end(), end);
      const auto num_bytes = static_cast<std::size_t>(end - host) * sizeof(std::int32_t);
      EDGELLM_CUDA_TRY(cudaMemsetAsync(counts, 0, vocab * sizeof(std::uint32_t), stream));
      if (num_bytes > 0) EDGELLM_CUDA_TRY(cudaMemcpyAsync(device, host, num_bytes, cudaMemcpyHostToDevice, stream));
      kernels::count_tokens_async(device, static_cast<int>(sequence.prompt_ids.size()),
                                  static_cast<int>(sequence.answer_ids.size()), counts, stream, false);
    }
    if (!sequence.bias_ids.empty()) {
      const std::size_t count = sequence.bias_ids.size();
      std::int32_t* ids = host_bias_.as<std::int32_t>() + i * kMaxBias;
      auto* values = host_bias_.as<float>() + (kMaxBatch + i) * kMaxBias;
      std::copy(sequence.bias_ids.begin(), sequence.bias_ids.end(), ids);
      std::copy(sequence.bias_values.begin(), sequence.bias_values.end(), values);
      EDGELLM_CUDA_TRY(cudaMemcpyAsync(arena_.get<std::int32_t>("bias_ids") + i * kMaxBias, ids,
                                       count * sizeof(std::int32_t), cudaMemcpyHostToDevice, stream));
      EDGELLM_CUDA_TRY(cudaMemcpyAsync(arena_.get<float>("bias_values") + i * kMaxBias, values, count * sizeof(float),
                                       cudaMemcpyHostToDevice, stream));
    }
    if (sequence.row.use_mask != 0) {  // until set_run_mask_async is called, everything is allowed
      EDGELLM_CUDA_TRY(cudaMemsetAsync(arena_.get<std::uint32_t>("token_mask") + i * words, 0xff,
                                       words * sizeof(std::uint32_t), stream));
    }
  }
}

void TokenLoop::set_run_mask_async(int index, std::span<const std::uint32_t> words) {
  const std::size_t size = mask_words(config_.num_rows());
  if (index < 0 || index >= run_key_.batch || run_rows_[static_cast<std::size_t>(index)].use_mask == 0) {
    throw std::invalid_argument("sequence " + std::to_string(index) + " of the run was not started with a mask");
  }
  if (words.size() != size) {
    throw std::invalid_argument("a mask has " + std::to_string(size) + " words of 32 tokens, not " +
                                std::to_string(words.size()));
  }
  if (run_read_ < run_launched_) {
    throw std::logic_error("a mask depends on the token before; read the steps under way first");
  }
  guarded([&] {
    const auto at = static_cast<std::size_t>(index) * size;
    std::uint32_t* host = host_mask_.as<std::uint32_t>() + at;
    std::copy(words.begin(), words.end(), host);
    EDGELLM_CUDA_TRY(cudaMemcpyAsync(arena_.get<std::uint32_t>("token_mask") + at, host, size * sizeof(std::uint32_t),
                                     cudaMemcpyHostToDevice, stream_.get()));
  });
}

void TokenLoop::reserve_sampling() {
  const auto batch = std::size_t{kMaxBatch};
  const auto seen_length = static_cast<std::size_t>(config_.capacity);
  host_sampling_rows_ = PinnedBuffer(batch * sizeof(SamplingRow));
  host_seen_ = PinnedBuffer(batch * seen_length * sizeof(std::int32_t));
  host_bias_ = PinnedBuffer(batch * kMaxBias * (sizeof(std::int32_t) + sizeof(float)));
  host_mask_ = PinnedBuffer(batch * mask_words(config_.num_rows()) * sizeof(std::uint32_t));
  host_logprobs_ = PinnedBuffer(batch * kHistoryLength * sizeof(kernels::TokenLogprobs));
}

void TokenLoop::clear_sampling_async() {
  for (const char* name : {"sampling_rows", "token_counts", "token_mask", "bias_ids", "bias_values", "seen_ids"}) {
    EDGELLM_CUDA_TRY(cudaMemsetAsync(arena_.get<std::byte>(name), 0, arena_.plan().size(name), stream_.get()));
  }
  // CUDA loads a kernel's code, which takes memory, when it first runs.
  kernels::count_tokens_async(arena_.get<std::int32_t>("seen_ids"), 1, 0, arena_.get<std::uint32_t>("token_counts"),
                              stream_.get(), false);
}

kernels::DecodeState TokenLoop::decode_state() const {
  auto* tokens = arena_.get<std::int32_t>("decode_inputs");  // then positions, then slots
  kernels::DecodeState state;
  state.token_ids = tokens;
  state.positions = tokens + kMaxBatch;
  state.history = host_history_.device_as<std::int32_t>();
  state.step_counts = arena_.get<std::int32_t>("step_counts");
  state.history_length = kHistoryLength;
  state.row_tokens = row_tokens();
  return state;
}

void TokenLoop::record_sampling_async(const StepKey& key, bool pdl) {
  kernels::SamplingArgs sampling;
  sampling.logits = step_logits(key);
  sampling.scores = arena_.get<float>("scores");
  sampling.rows = arena_.get<SamplingRow>("sampling_rows");
  if (key.tail == StepTail::kSampleEverything) {
    sampling.counts = arena_.get<std::uint32_t>("token_counts");
    sampling.bias_ids = arena_.get<std::int32_t>("bias_ids");
    sampling.bias_values = arena_.get<float>("bias_values");
    sampling.max_bias = kMaxBias;
    sampling.token_mask = arena_.get<std::uint32_t>("token_mask");
    sampling.logprobs = host_logprobs_.device_as<kernels::TokenLogprobs>();
  }
  sampling.batch = key.batch;
  sampling.vocab = config_.num_rows();
  sampling.state = decode_state();
  sampling.table = &embedding();
  sampling.embed_scale = config_.embed_scale;
  sampling.residual = arena_.get<float>("residual");
  sampling.residual_bf16 = arena_.get<__nv_bfloat16>("residual_bf16");
  kernels::sample_async(sampling, stream_.get(), pdl);
}

}  // namespace edgellm
