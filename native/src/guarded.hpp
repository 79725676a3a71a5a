// What the decoder's source files share.
#pragma once

#include <cmath>

#include "edgellm/decoder.hpp"

namespace edgellm {

inline float attention_scale(const DecoderConfig& config) {
  return config.attention_scale > 0.0F ? config.attention_scale : 1.0F / std::sqrt(static_cast<float>(config.head_dim));
}

// What the product of gate and up ends with.
inline kernels::Epilogue gate_epilogue(const DecoderConfig& config) {
  return config.activation == kernels::Activation::gelu_tanh ? kernels::Epilogue::geglu : kernels::Epilogue::swiglu;
}

}  // namespace edgellm
