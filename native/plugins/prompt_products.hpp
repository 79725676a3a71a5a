// A product of a prompt: the weight is brought to bf16 in parts, and cuBLASLt multiplies each. Fewer tokens go through
// the decode kernels, which read the weight once for every 16.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>

#include "convert.hpp"
#include "edgellm/kernels/types.hpp"

namespace edgellm::plugins {

// From here on a prompt: four passes over the weight in 4 bits are about what bringing it to bf16 and back costs. A
// draft of up to 64 tokens has the rounding of single steps.
constexpr std::int64_t kFewestPromptTokens = 65;

struct PromptProduct {
  kernels::WeightView weight;   // int4 as packed, or int8
  const float* bias = nullptr;  // (rows), or null
  const void* x = nullptr;      // (num_tokens, cols) of `type`
  void* y = nullptr;            // (num_tokens, rows) of `type`, or fp32
  Activation type = Activation::fp16;
  bool float_output = false;
  std::int64_t num_tokens = 0;
  void* workspace = nullptr;  // prompt_workspace_bytes
  cudaStream_t stream = nullptr;
};

// Where a weight of this shape is multiplied with at most so many tokens; 0 where none of them is a prompt.
std::size_t prompt_workspace_bytes(std::int64_t rows, std::int64_t cols, std::int64_t most_tokens, Activation type);

// False, and nothing is launched, where there is no cuBLASLt or it has no algorithm for this shape.
bool prompt_product_async(const PromptProduct& product);

}  // namespace edgellm::plugins
