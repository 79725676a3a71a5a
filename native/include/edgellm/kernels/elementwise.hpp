// The prefill's small kernels between the matrix products.
#pragma once

#include "edgellm/kernels/types.hpp"

namespace edgellm::kernels {

// out[t] = gain * x[t] / rms(x[t]).
void rms_norm_async(const float* x,             // (num_tokens, hidden)
                    const __nv_bfloat16* gain,  // (hidden)
                    float eps, int num_tokens, int hidden,
                    __nv_bfloat16* out,  // (num_tokens, hidden)
                    cudaStream_t stream, bool pdl);

// residual += delta (+ bias), residual_bf16 = its copy, and, unless gain is null, normed = rms_norm(residual): the step
// from one matrix product to the next.
struct ResidualNormArgs {
  const __nv_bfloat16* delta = nullptr;    // (num_tokens, hidden)
  const float* bias = nullptr;             // (hidden), or null
  float* residual = nullptr;               // (num_tokens, hidden)
  __nv_bfloat16* residual_bf16 = nullptr;  // (num_tokens, hidden), or null
  const __nv_bfloat16* gain = nullptr;     // (hidden), or null
  float eps = 1e-6f;
  __nv_bfloat16* normed = nullptr;  // (num_tokens, hidden)
  int num_tokens = 0;
  int hidden = 0;
};
void residual_norm_async(const ResidualNormArgs& args, cudaStream_t stream, bool pdl);

// out[t, i] = silu(gate_up[t, i]) * gate_up[t, width + i], with bias (2 * width) added first unless it is null.
void swiglu_async(const __nv_bfloat16* gate_up,  // (num_tokens, 2 * width)
                  const float* bias, int num_tokens, int width,
                  __nv_bfloat16* out,  // (num_tokens, width)
                  cudaStream_t stream, bool pdl);

// out[i] = x[rows[i]]; a negative row gives zeros. `hidden` is a multiple of 8.
void gather_rows_async(const __nv_bfloat16* x, const int32_t* rows, int num_rows, int hidden, __nv_bfloat16* out,
                       cudaStream_t stream, bool pdl);

}  // namespace edgellm::kernels
