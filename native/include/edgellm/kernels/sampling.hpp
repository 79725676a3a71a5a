// The next token of every sequence, chosen on the device from fp32 logits, and left where the next step reads it.
#pragma once

#include "edgellm/kernels/types.hpp"

namespace edgellm::kernels {

// What the device keeps of a decode batch between steps, so that one graph serves every step.
struct DecodeState {
  int32_t* token_ids = nullptr;  // (batch) the token to embed next; -1: the logits were not finite
  int32_t* positions = nullptr;  // (batch) its position; sampling adds 1; negative: a free place, left alone
  // Ring of the tokens chosen, for the host to read one step behind: history[b * length + step_counts[b] % length].
  int32_t* history = nullptr;      // (batch, history_length), or null
  int32_t* step_counts = nullptr;  // (batch) tokens chosen; sampling adds 1; null with history
  int history_length = 0;
  // Where the head is cut: the token that each row of the logits stands for, ascending; null: the row's own number. All
  // above, and log-probabilities, are tokens; logits, counts, bias and masks have rows, which are the draw's order too.
  const int32_t* row_tokens = nullptr;  // (vocab of the logits)
};

// Greedy: a key of block_max is ordered as the logit, then by falling id, and holds 0xffffffff - id in its low 32 bits.
// The largest wins; then, unless `table` is null, its embedding (as embedding_async) for the next step.
struct GreedyArgs {
  const unsigned long long* block_max = nullptr;  // (batch, num_blocks)
  int num_blocks = 0;
  int batch = 1;
  DecodeState state;
  const WeightView* table = nullptr;
  float embed_scale = 1.0f;
  float* residual = nullptr;               // (batch, hidden)
  __nv_bfloat16* residual_bf16 = nullptr;  // (batch, hidden)
};
void greedy_async(const GreedyArgs& args, cudaStream_t stream, bool pdl);

// One sequence's sampling parameters, in device memory (edgellm_ros/core.py: SamplingParams).
struct SamplingRow {
  uint64_t seed;
  float temperature;         // <= 0: greedy
  float top_p;               // 1: off
  float min_p;               // 0: off
  float repetition_penalty;  // 1: off
  float presence_penalty;    // 0: off
  float frequency_penalty;   // 0: off
  int32_t top_k;             // 0: off
  int32_t draw_index;        // index of the next draw; sampling adds 1
  int32_t num_bias;          // entries of bias_ids and bias_values
  int32_t use_mask;          // whether the row of token_mask counts
  int32_t num_top;           // most likely tokens whose log-probabilities go with the token's own; -1: none at all
  int32_t unused;
};
static_assert(sizeof(SamplingRow) == 56);

constexpr int kMaxTopLogprobs = 20;

// Under the model's own distribution, before bias, penalties and temperature. Not written for a token of -1.
struct TokenLogprobs {
  float logprob;    // of the token drawn
  int32_t num_top;  // entries that follow, most likely first; the lower id first of equal ones
  int32_t top_ids[kMaxTopLogprobs];
  float top_logprobs[kMaxTopLogprobs];
};

struct SamplingArgs {
  float* logits = nullptr;      // (batch, vocab); left as they are
  float* scores = nullptr;      // (batch, vocab) workspace
  SamplingRow* rows = nullptr;  // (batch)
  // Any of the next four that is not null makes it the slower kernel, which looks at all that a row may have.
  // Per token: bit 31 says the prompt has it, the low bits how often the answer has it. Sampling counts the token
  // drawn, in rows with a penalty.
  uint32_t* counts = nullptr;          // (batch, vocab), or null: no penalties
  const int32_t* bias_ids = nullptr;   // (batch, max_bias), or null
  const float* bias_values = nullptr;  // (batch, max_bias)
  int max_bias = 0;
  const uint32_t* token_mask = nullptr;  // (batch, (vocab + 31) / 32) bit set: allowed; or null
  TokenLogprobs* logprobs = nullptr;     // (batch, history_length), the entry that state.history gets; or null
  int batch = 1;
  int vocab = 0;
  DecodeState state;
  const WeightView* table = nullptr;  // as in GreedyArgs
  float embed_scale = 1.0f;
  float* residual = nullptr;
  __nv_bfloat16* residual_bf16 = nullptr;
};
void sample_async(const SamplingArgs& args, cudaStream_t stream, bool pdl);

// Adds to one sequence's counts (vocab), which SamplingArgs::counts explains: num_prompt, then num_answer ids, all of
// them below vocab.
void count_tokens_async(const int32_t* ids, int num_prompt, int num_answer, uint32_t* counts, cudaStream_t stream,
                        bool pdl);

}  // namespace edgellm::kernels
