// Embedding lookup: token ids on the device to rows of the residual stream.
#include <cassert>

#include "edgellm/kernels/embedding.hpp"
#include "embedding_row.cuh"
#include "launch.hpp"

namespace edgellm::kernels {

namespace {

constexpr int kThreads = 256;

__global__ void __launch_bounds__(kThreads)
    embedding_kernel(const EmbeddingTable table, const int32_t* token_ids, float* residual, bf16* residual_bf16) {
  start_dependents();
  wait_for_predecessor();
  const int token = blockIdx.x;  // an engine's prefill may have more of them than a grid's other axes
  const int id = *static_cast<const volatile int32_t*>(token_ids + token);
  const std::size_t at = static_cast<std::size_t>(token) * table.cols;
  embed_row(table, id, blockIdx.y * kThreads + threadIdx.x, gridDim.y * kThreads, residual + at, residual_bf16 + at);
}

__global__ void __launch_bounds__(kThreads)
    copy_kernel(const bf16* embeddings, std::size_t count, float* residual, bf16* residual_bf16) {
  start_dependents();
  wait_for_predecessor();
  const std::size_t i = static_cast<std::size_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= count) return;
  const bf16 v = embeddings[i];
  residual[i] = __bfloat162float(v);
  residual_bf16[i] = v;
}

}  // namespace

void embedding_async(const WeightView& table, const int32_t* token_ids, int num_tokens, float scale, float* residual,
                     bf16* residual_bf16, cudaStream_t stream, bool pdl) {
  assert(table.format == WeightFormat::bf16 || table.format == WeightFormat::fp16 ||
         table.format == WeightFormat::int8);
  launch(embedding_kernel, dim3(num_tokens, ceil_div(table.cols, kThreads)), dim3(kThreads), 0, stream, pdl,
         embedding_table(table, scale), token_ids, residual, residual_bf16);
}

void embeddings_from_bf16_async(const bf16* embeddings, int num_tokens, int hidden, float* residual,
                                bf16* residual_bf16, cudaStream_t stream, bool pdl) {
  const std::size_t count = static_cast<std::size_t>(num_tokens) * hidden;
  launch(copy_kernel, dim3(static_cast<unsigned>((count + kThreads - 1) / kThreads)), dim3(kThreads), 0, stream, pdl,
         embeddings, count, residual, residual_bf16);
}

}  // namespace edgellm::kernels
