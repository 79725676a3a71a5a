// The rows of a step that get logits, where they do not lie together: an engine's double asks for them by index.
#pragma once

#include "edgellm/kernels/types.hpp"

namespace edgellm::kernels {

// out[i] = x[rows[i]]; a negative row gives zeros. `hidden` is a multiple of 8.
void gather_rows_async(const __nv_bfloat16* x, const int32_t* rows, int num_rows, int hidden, __nv_bfloat16* out,
                       cudaStream_t stream, bool pdl);

}  // namespace edgellm::kernels
