// Rows of the embedding table, chosen by ids on the device, into the residual stream.
#pragma once

#include "edgellm/kernels/types.hpp"

namespace edgellm::kernels {

// residual[t] = scale * table[token_ids[t]], and its bf16 copy. `table` is bf16, fp16 or int8.
// An id outside the table gives zeros.
void embedding_async(const WeightView& table, const int32_t* token_ids,  // (num_tokens)
                     int num_tokens, float scale,
                     float* residual,               // (num_tokens, cols)
                     __nv_bfloat16* residual_bf16,  // (num_tokens, cols)
                     cudaStream_t stream, bool pdl);

// The same residual from embeddings that were computed elsewhere (images).
void embeddings_from_bf16_async(const __nv_bfloat16* embeddings,  // (num_tokens, hidden)
                                int num_tokens, int hidden, float* residual, __nv_bfloat16* residual_bf16,
                                cudaStream_t stream, bool pdl);

}  // namespace edgellm::kernels
