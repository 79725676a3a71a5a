// What happens to a chosen token: state for the next step, history for the host, the next step's embedding.
#pragma once

#include "edgellm/kernels/sampling.hpp"
#include "embedding_row.cuh"

namespace edgellm::kernels {

struct NextStep {
  DecodeState state;
  EmbeddingTable table;  // data null: no embedding
  float* residual;       // (batch, cols)
  bf16* residual_bf16;   // (batch, cols)
};

inline NextStep next_step(const DecodeState& state, const WeightView* table, float scale, float* residual,
                          bf16* residual_bf16) {
  return {state, table ? embedding_table(*table, scale) : EmbeddingTable{}, residual, residual_bf16};
}

// Whether place b of the batch has a sequence.
__device__ __forceinline__ bool is_active(const DecodeState& state, int b) {
  return *static_cast<const volatile int32_t*>(state.positions + b) >= 0;
}

// The token of a row of the logits; a negative one stays what it is.
__device__ __forceinline__ int token_of(const DecodeState& state, int row) {
  return state.row_tokens && row >= 0 ? __ldg(state.row_tokens + row) : row;
}

// By all threads of one block, with the row of the token. A row of -1 (logits that are not finite) reaches the host
// through the history.
__device__ __forceinline__ void finish_token(const NextStep& next, int b, int row) {
  const int token = token_of(next.state, row);
  if (threadIdx.x == 0) {
    const DecodeState& state = next.state;
    state.token_ids[b] = token;
    state.positions[b] += 1;
    if (state.history) {
      const int32_t count = state.step_counts[b];
      state.history[static_cast<std::size_t>(b) * state.history_length + count % state.history_length] = token;
      state.step_counts[b] = count + 1;
    }
  }
  if (next.table.data) {
    const std::size_t at = static_cast<std::size_t>(b) * next.table.cols;
    embed_row(next.table, token, threadIdx.x, blockDim.x, next.residual + at, next.residual_bf16 + at);
  }
}

}  // namespace edgellm::kernels
