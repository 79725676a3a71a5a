// A product's bf16 result in fp32, as attention of single tokens and of drafts reads it.
#pragma once

#include "edgellm/kernels/types.hpp"

namespace edgellm::kernels {

// out[t] = y[t] + bias. `width` is a multiple of 8.
void widen_async(const __nv_bfloat16* y,  // (num_tokens, width)
                 const float* bias,       // (width), or null
                 float* out,              // (num_tokens, width)
                 int num_tokens, int width, cudaStream_t stream, bool pdl);

}  // namespace edgellm::kernels
