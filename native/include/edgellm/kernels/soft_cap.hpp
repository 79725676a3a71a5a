// Logits that a model keeps within bounds (Gemma 2 and 3).
#pragma once

#include "edgellm/kernels/types.hpp"

namespace edgellm::kernels {

// x = cap * tanh(x / cap), of `count` numbers: what keeps a model's logits within -cap and cap.
void soft_cap_async(float* x, std::size_t count, float cap, cudaStream_t stream, bool pdl);

}  // namespace edgellm::kernels
