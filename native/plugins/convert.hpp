// Between an engine's tensors and the kernels' arguments: number formats, and lists of slots, positions and depths.
#pragma once

#include <cuda_bf16.h>
#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>

namespace edgellm::plugins {

enum class Activation : int { fp16 = 0, bf16 = 1 };

void to_float_async(const void* in, Activation type, float* out, std::size_t count, cudaStream_t stream);
void to_bf16_async(const void* in_fp16, __nv_bfloat16* out, std::size_t count, cudaStream_t stream);
void to_fp16_async(const float* in, void* out_fp16, std::size_t count, cudaStream_t stream);
void to_fp16_async(const __nv_bfloat16* in, void* out_fp16, std::size_t count, cudaStream_t stream);

// Part of a product, with its bias, to where the engine wants it.
struct FinishArgs {
  const float* y = nullptr;     // (num_tokens, num_rows)
  const float* bias = nullptr;  // (num_rows), or null
  int num_tokens = 0;
  int num_rows = 0;
  int stride = 0;  // from a token's row of `out` to the next
  void* out = nullptr;
  Activation type = Activation::fp16;
  bool float_output = false;
};
void finish_async(const FinishArgs& args, cudaStream_t stream);

// Everything that the attention kernels want beside qkv. Sequence b writes its token s at write_indices[b] + s. It has
// as many tokens as come before the first with a negative position id or no room in the cache; the others get zeros.
struct PrepareArgs {
  const std::int64_t* position_ids = nullptr;   // (batch, tokens_each)
  const std::int64_t* write_indices = nullptr;  // (batch)
  int batch = 0;
  int tokens_each = 0;
  int capacity = 0;
  const float* q_gain = nullptr;  // (head_dim), or null
  const float* k_gain = nullptr;
  int head_dim = 0;
  int out_width = 0;  // of a token's row of `out`

  std::int32_t* slots = nullptr;            // (batch)
  std::int32_t* positions = nullptr;        // (batch) of the first token; -1: none
  std::int32_t* starts = nullptr;           // (batch, 2) 0, and how many rows the sequence has
  std::int32_t* token_slots = nullptr;      // (batch * tokens_each)
  std::int32_t* token_positions = nullptr;  // (batch * tokens_each) in the cache; -1: left out
  std::int32_t* depths = nullptr;           // (batch * tokens_each) position id less write index
  __nv_bfloat16* gains = nullptr;           // (2, head_dim)
  __nv_bfloat16* out = nullptr;             // (batch * tokens_each, out_width) rows left out become zeros
  std::uint32_t* counters = nullptr;        // (num_counters) become zeros
  int num_counters = 0;
};
void prepare_async(const PrepareArgs& args, cudaStream_t stream);

}  // namespace edgellm::plugins
