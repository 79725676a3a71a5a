// Which GEMV kernel and tile configuration serves a shape on a GPU: the same for every launch, so that they agree.
#pragma once

#include "gemv_common.cuh"

namespace edgellm::kernels {

enum class GemvFamily { fma, several, once, ring, int4, mma, resident };
struct GemvChoice {
  GemvFamily family;
  GemvTile tile;
};

int num_gemv_choices(const GemvArgs& args, const GemvDevice& device);
GemvChoice choose_gemv(const GemvArgs& args, const GemvDevice& device);

// Shared memory of a block of the choice's kernel, at most: statically allocated, or by the number of tokens.
std::size_t gemv_shared_bytes(const GemvArgs& args, const GemvChoice& choice);

}  // namespace edgellm::kernels
