// What a run is made of: sequences whose tokens are drawn on the device, each feeding its sequence's next step.
#pragma once

#include <array>
#include <cstdint>
#include <span>

#include "edgellm/decoder_config.hpp"
#include "edgellm/kernels/sampling.hpp"

namespace edgellm {

constexpr int kMaxBias = 1024;  // entries of logit_bias a sequence

// One sequence of a run: where it stands, and how its tokens are drawn. The spans are read by start_run only. They, and
// masks, have rows of the head instead of tokens where the head is cut, and nothing for a token without one.
struct RunSequence {
  int slot = 0;
  int position = 0;                          // of token_id
  std::int32_t token_id = 0;                 // the last token known; its step is the run's first
  kernels::SamplingRow row{};                // num_bias is set by the run
  std::span<const std::int32_t> prompt_ids;  // with a penalty: what the prompt has
  std::span<const std::int32_t> answer_ids;  // and what the answer has so far, token_id included
  std::span<const std::int32_t> bias_ids;    // at most kMaxBias
  std::span<const float> bias_values;        // one a bias_ids
  int adapter = 0;                           // of LoRA, 0: none
};

// What a step of a run gave. Valid until the next one is read.
struct RunStep {
  std::span<const std::int32_t> tokens;  // (batch); -1: the logits were not finite
  // One a sequence: null unless the sequence asked for log-probabilities.
  std::array<const kernels::TokenLogprobs*, kMaxBatch> logprobs{};
};

}  // namespace edgellm
