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
  std::int64_t* tree_masks = nullptr;     // (batch, length), bit j: the token sees the j-th; null: no such input
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

// Several tokens of one sequence, behind `position` others, with the logits of the last num_logits: each after the one
// before it, or, with depths and masks, a tree of at most 64 (see TreeAttentionArgs).
struct EngineChunkArgs {
  const float* residual = nullptr;  // (num_tokens, hidden)
  int num_tokens = 0;
  int hidden = 0;
  int position = 0;
  const std::int32_t* start = nullptr;  // on the device, in place of `position`
  int num_logits = 1;
  const std::int32_t* depths = nullptr;  // (num_tokens)
  const std::uint64_t* masks = nullptr;  // (num_tokens)
  EngineInputs out;
};
void engine_chunk_async(const EngineChunkArgs& args, cudaStream_t stream);

// What each token adds to its scores: 0 for a place of the cache that it sees, a number that softmax makes 0 for
// others. It sees its own position and those before, the last `window` of them (0: all); with `tree`, which one
// sequence has, what TreeAttentionArgs says.
struct EngineMaskArgs {
  const std::int64_t* positions = nullptr;  // (num_tokens)
  int num_tokens = 0;
  int capacity = 0;
  int window = 0;
  const std::uint64_t* tree = nullptr;  // (num_tokens) masks of a tree's nodes
  int prefix = 0;                       // places before the tree
  const std::int32_t* start = nullptr;  // on the device, in place of `prefix`
  void* mask = nullptr;                 // (num_tokens, capacity) fp16 or bf16
  bool is_bf16 = false;
};
void engine_mask_async(const EngineMaskArgs& args, cudaStream_t stream);

}  // namespace edgellm::kernels
