// RMSNorm, alone or behind a residual addition.
#pragma once

#include "edgellm/kernels/types.hpp"

namespace edgellm::kernels {

constexpr int kMaxNormWidth = 16384;  // of residual_norm_async's rows

// out[t] = gain * x[t] / rms(x[t]).
void rms_norm_async(const float* x,             // (num_tokens, hidden)
                    const __nv_bfloat16* gain,  // (hidden)
                    float eps, int num_tokens, int hidden,
                    __nv_bfloat16* out,  // (num_tokens, hidden)
                    cudaStream_t stream, bool pdl);

// residual += delta (+ bias), or with delta_gain rms_norm(delta + bias); residual_bf16 = its copy, and, unless gain is
// null, normed = rms_norm(residual): the step from one matrix product to the next. `hidden` is a multiple of 8.
struct ResidualNormArgs {
  const __nv_bfloat16* delta = nullptr;       // (num_tokens, hidden), or null: then delta_f32
  const float* delta_f32 = nullptr;           // (num_tokens, hidden), with delta_gain only
  ProductScales scales;                       // of delta
  const float* bias = nullptr;                // (hidden), or null
  const __nv_bfloat16* delta_gain = nullptr;  // (hidden) of the norm of what is added, or null: none
  float* residual = nullptr;                  // (num_tokens, hidden)
  __nv_bfloat16* residual_bf16 = nullptr;     // (num_tokens, hidden), or null
  const __nv_bfloat16* gain = nullptr;        // (hidden), or null
  float eps = 1e-6f;
  __nv_bfloat16* normed = nullptr;     // (num_tokens, hidden), or null: then normed_fp8
  std::uint8_t* normed_fp8 = nullptr;  // (num_tokens, hidden) E4M3
  float* normed_scales = nullptr;      // (num_tokens), of normed_fp8; may be scales.rows
  int num_tokens = 0;
  int hidden = 0;
};
void residual_norm_async(const ResidualNormArgs& args, cudaStream_t stream, bool pdl);

}  // namespace edgellm::kernels
