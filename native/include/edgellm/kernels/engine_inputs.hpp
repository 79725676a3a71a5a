// What a TensorRT engine reads of a step, out of what the decode loop keeps on the device: embeddings in the engine's
// dtype, positions and places in the cache as int64, and which rows it wants logits of.
#pragma once

#include "edgellm/kernels/types.hpp"

namespace edgellm::kernels {

// Inputs of one enqueue (the names are of edgellm_ros/executors/contract.py: roles).
struct EngineInputs {
  void* embeds = nullptr;                 // (batch, length, hidden) fp16 or bf16
  std::int64_t* positions = nullptr;      // (batch, length)
  std::int64_t* write_indices = nullptr;  // (batch)
  std::int64_t* logit_indices = nullptr;  // (num_logits) rows of (batch * length)
  bool is_bf16 = false;
};

// A decode step of the slots first_slot to first_slot + num_rows - 1, a token each. The sequences whose bit is set in
// `members` are among them, and get logits in their order; the rows of other slots are idle: they write at idle_place.
struct EngineRowsArgs {
  const std::int32_t* positions = nullptr;  // (batch)
  const std::int32_t* slots = nullptr;      // (batch)
  const float* residual = nullptr;          // (batch, hidden) embeddings
  int batch = 0;                            // at most 32
  std::uint32_t members = 0;
  int hidden = 0;
  int first_slot = 0;
  int num_rows = 0;
  int idle_place = 0;
  EngineInputs out;
};
void engine_rows_async(const EngineRowsArgs& args, cudaStream_t stream);

// Several tokens of one sequence, from `position` on, with the logits of the last num_logits.
struct EngineChunkArgs {
  const float* residual = nullptr;  // (num_tokens, hidden)
  int num_tokens = 0;
  int hidden = 0;
  int position = 0;
  int num_logits = 1;
  EngineInputs out;
};
void engine_chunk_async(const EngineChunkArgs& args, cudaStream_t stream);

}  // namespace edgellm::kernels
