// What the double does on the device beside the project's kernels: simple, and slow where that is simpler.
#pragma once

#include <cuda_bf16.h>
#include <cuda_runtime_api.h>

#include <cstdint>

#include "edgellm/kernels/gemv.hpp"
#include "edgellm/kernels/lora.hpp"
#include "edgellm/kernels/types.hpp"

namespace edgellm::nvinfer_double {

// Turns the int64 inputs into what the kernels read. Row (b, s) is in order when its position is write_indices[b] + s,
// or in a tree at most that, and inside the cache and the rope tables; rows that are not are padding, whose place is
// -1.
struct PrepareArgs {
  const std::int64_t* positions = nullptr;      // (batch, length)
  const std::int64_t* write_indices = nullptr;  // (batch)
  const std::int64_t* logit_indices = nullptr;  // (num_logits), rows of (batch * length)
  int batch = 0;
  int length = 0;
  int num_logits = 0;
  int capacity = 0;
  int num_positions = 0;
  std::int32_t* places = nullptr;          // (batch * length), -1: padding
  std::int32_t* slots = nullptr;           // (batch * length)
  std::int32_t* starts = nullptr;          // (batch + 1), rows of each sequence
  std::int32_t* sequence_slots = nullptr;  // (batch): 0, 1, …
  std::int32_t* first_places = nullptr;    // (batch)
  std::int32_t* logit_rows = nullptr;      // (num_logits), -1: of padding, or outside
  std::int32_t* ones = nullptr;            // (kMaxGemvTokens), all 1: every token has the bound adapter
  std::int32_t* depths = nullptr;          // (batch * length) of a tree's nodes; null: no tree
};
void prepare_async(const PrepareArgs& args, cudaStream_t stream);

// Compares a mask with what its row may see: all of the prefix and the token itself, and of the other new tokens, in a
// tree, those before it that it names. A row that sees anything else, or not all of that, gets the place -1. nodes: the
// new tokens that it sees, for the kernels.
struct CheckMaskArgs {
  const void* mask = nullptr;                // (batch * length, capacity), or null: then
  const std::int64_t* tree_masks = nullptr;  // (batch * length) bits of the new tokens
  bool is_bf16 = false;
  bool is_tree = false;
  int window = 0;
  const std::int64_t* positions = nullptr;      // (batch * length)
  const std::int64_t* write_indices = nullptr;  // (batch)
  int batch = 0;
  int length = 0;
  int capacity = 0;
  std::int32_t* places = nullptr;  // (batch * length)
  std::uint64_t* nodes = nullptr;  // (batch * length), of a tree
};
void check_mask_async(const CheckMaskArgs& args, cudaStream_t stream);
// Rows of logits whose place is -1 are of padding.
void drop_rows_async(const std::int32_t* places, std::int32_t* logit_rows, int num_logits, cudaStream_t stream);

// residual and its bf16 copy of `count` embeddings in fp16 or bf16.
void embed_async(const void* embeds, bool is_bf16, std::size_t count, float* residual, __nv_bfloat16* residual_bf16,
                 cudaStream_t stream);

// out[i] = x[rows[i]], rows of `width`; a negative row gives zeros.
void gather_rows_async(const __nv_bfloat16* x, const std::int32_t* rows, int num_rows, int width, __nv_bfloat16* out,
                       cudaStream_t stream);

// Copies the new keys and values from `kv` (slots, 2, kv_heads, capacity, head_dim) to where the caller bound them,
// slot by slot (kv_heads, capacity, head_dim). Padding leaves kPaddingMark there: finite, but no mask may let it
// through.
constexpr float kPaddingMark = 1000.0F;
struct StoreArgs {
  kernels::KvLayer kv;
  void* keys = nullptr;
  void* values = nullptr;
  std::size_t slot_elements = 0;                // from one sequence's keys, or values, to the next one's
  const std::int64_t* write_indices = nullptr;  // (batch)
  const std::int32_t* places = nullptr;         // (batch * length)
  int batch = 0;
  int length = 0;
};
void store_new_async(const StoreArgs& args, cudaStream_t stream);

// The bound A [in, rank] and B [rank, out] as the LoRA kernels have them: `a` (padded rank, in), `b` (out, padded rank)
// and the entry that points to both.
struct PackLoraArgs {
  const void* bound_a = nullptr;
  const void* bound_b = nullptr;
  bool is_bf16 = false;
  int rank = 0;  // 1 to kMaxLoraRank
  int in = 0;
  int out = 0;
  __nv_bfloat16* a = nullptr;
  __nv_bfloat16* b = nullptr;
  kernels::LoraLinear* entry = nullptr;
};
void pack_lora_async(const PackLoraArgs& args, cudaStream_t stream);

// Counts an execution, also one that a graph replays; the one numbered `trap` ends in a device error.
void count_execution_async(std::uint32_t* executions, std::int64_t trap, cudaStream_t stream);

// NaN in the rows of logits (num_logits, width) that are of padding, and in all from execution `nan_from` on (0:
// never).
void spoil_logits_async(const std::int32_t* logit_rows, int num_logits, int width, const std::uint32_t* executions,
                        std::int64_t nan_from, float* logits, cudaStream_t stream);

}  // namespace edgellm::nvinfer_double
