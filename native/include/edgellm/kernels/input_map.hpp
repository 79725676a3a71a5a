// A layer's input as its checkpoint wants it: in another order (GPTQ's act-order), times a factor for each feature
// (AWQ).
#pragma once

#include "edgellm/kernels/types.hpp"

namespace edgellm::kernels {

// out[t, j] = x[t, order[j]] * factor[j], rounded once. `cols` is a multiple of 8; out is not x.
struct InputMapArgs {
  const __nv_bfloat16* x = nullptr;  // (num_tokens, cols)
  const int32_t* order = nullptr;    // (cols), or null: as they are
  const float* factor = nullptr;     // (cols) of the mapped features, or null: ones
  __nv_bfloat16* out = nullptr;      // (num_tokens, cols)
  int num_tokens = 0;
  int cols = 0;
};
void map_input_async(const InputMapArgs& args, cudaStream_t stream, bool pdl);

}  // namespace edgellm::kernels
