// One row of an embedding table, by all threads of a block: also used by sampling, which embeds the token it chose.
#pragma once

#include "device.cuh"
#include "edgellm/kernels/types.hpp"

namespace edgellm::kernels {

struct EmbeddingTable {
  const void* data;
  const __half* scales;  // (rows, cols / group), int8 only
  int rows;
  int cols;
  int group;
  WeightFormat format;
  float scale;
};

inline EmbeddingTable embedding_table(const WeightView& w, float scale) {
  return {w.data, static_cast<const __half*>(w.scales), w.rows, w.cols, w.group, w.format, scale};
}

// Columns first to first + stride * n of row `id`; an id outside the table gives zeros.
__device__ __forceinline__ void embed_row(const EmbeddingTable& table, int id, int first, int stride, float* residual,
                                          bf16* residual_bf16) {
  const bool inside = id >= 0 && id < table.rows;
  for (int i = first; i < table.cols; i += stride) {
    const std::size_t at = static_cast<std::size_t>(id) * table.cols + i;
    float v = 0.0f;
    if (inside) {
      if (table.format == WeightFormat::bf16) {
        v = __bfloat162float(static_cast<const bf16*>(table.data)[at]);
      } else if (table.format == WeightFormat::fp16) {
        v = __half2float(static_cast<const __half*>(table.data)[at]);
      } else {
        const std::size_t groups = table.cols / table.group;
        v = static_cast<float>(static_cast<const int8_t*>(table.data)[at]) *
            __half2float(table.scales[static_cast<std::size_t>(id) * groups + i / table.group]);
      }
    }
    v *= table.scale;
    residual[i] = v;
    residual_bf16[i] = __float2bfloat16(v);
  }
}

}  // namespace edgellm::kernels
