// A prompt's MLP between its two products.
#pragma once

#include "edgellm/kernels/types.hpp"

namespace edgellm::kernels {

// out[t, i] = activation(gate_up[t, i]) * gate_up[t, width + i]. `width` is a multiple of 8.
struct SwigluArgs {
  const __nv_bfloat16* gate_up = nullptr;  // (num_tokens, 2 * width)
  ProductScales scales;                    // of gate_up
  const float* bias = nullptr;             // (2 * width) added to gate_up, or null; 16-byte aligned
  __nv_bfloat16* out = nullptr;            // (num_tokens, width), or null: then out_fp8
  std::uint8_t* out_fp8 = nullptr;         // (num_tokens, width) E4M3
  float* out_scales = nullptr;             // (num_tokens), of out_fp8; may be scales.rows
  int num_tokens = 0;
  int width = 0;  // at most kMaxFp8Width for out_fp8
  Activation activation = Activation::silu;
};
constexpr int kMaxFp8Width = 40960;  // a row lies in shared memory until its scale is known
void swiglu_async(const SwigluArgs& args, cudaStream_t stream, bool pdl);

}  // namespace edgellm::kernels
