// What the decoder's source files share.
#pragma once

#include <cmath>
#include <utility>

#include "edgellm/decoder.hpp"

namespace edgellm {

// Runs `body`; the first CudaError is remembered and thrown again by every later call: the device's state is unknown.
template <typename Body>
auto Decoder::guarded(Body&& body) {
  if (!failure_.empty()) throw CudaError(cudaErrorUnknown, "the decoder failed earlier: " + failure_);
  try {
    return std::forward<Body>(body)();
  } catch (const CudaError& error) {
    failure_ = error.what();
    throw;
  }
}

inline float attention_scale(const DecoderConfig& config) {
  return config.attention_scale > 0.0F ? config.attention_scale : 1.0F / std::sqrt(static_cast<float>(config.head_dim));
}

// What the product of gate and up ends with.
inline kernels::Epilogue gate_epilogue(const DecoderConfig& config) {
  return config.activation == kernels::Activation::gelu_tanh ? kernels::Epilogue::geglu : kernels::Epilogue::swiglu;
}

}  // namespace edgellm
