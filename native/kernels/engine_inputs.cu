// Embeddings, positions, places and wanted rows for a TensorRT engine.
#include <cassert>

#include "device.cuh"
#include "edgellm/kernels/engine_inputs.hpp"
#include "launch.hpp"

namespace edgellm::kernels {
namespace {

constexpr int kThreads = 256;

__device__ __forceinline__ void store(const EngineInputs& out, std::size_t at, float value) {
  if (out.is_bf16) {
    static_cast<bf16*>(out.embeds)[at] = __float2bfloat16(value);
  } else {
    static_cast<__half*>(out.embeds)[at] = __float2half(value);
  }
}

// A block a row.
__global__ void __launch_bounds__(kThreads) rows_kernel(const EngineRowsArgs args) {
  wait_for_predecessor();
  const int row = blockIdx.x;
  int found = -1;
  int rank = 0;  // members before it
  for (int i = 0; i < args.batch && found < 0; ++i) {
    if ((args.members >> i & 1) == 0) continue;
    if (args.slots[i] == args.first_slot + row) {
      found = i;
    } else {
      ++rank;
    }
  }
  if (threadIdx.x == 0) {
    args.out.positions[row] = found < 0 ? 0 : args.positions[found];
    args.out.write_indices[row] = found < 0 ? args.idle_place : args.positions[found];
    if (found >= 0) args.out.logit_indices[rank] = row;
  }
  for (int i = threadIdx.x; i < args.hidden; i += kThreads) {
    const float value = found < 0 ? 0.0f : args.residual[static_cast<std::size_t>(found) * args.hidden + i];
    store(args.out, static_cast<std::size_t>(row) * args.hidden + i, value);
  }
}

__global__ void __launch_bounds__(kThreads) chunk_kernel(const EngineChunkArgs args) {
  wait_for_predecessor();
  const int token = blockIdx.x;
  if (threadIdx.x == 0) {
    args.out.positions[token] = args.position + token;
    if (token == 0) args.out.write_indices[0] = args.position;
    const int row = token - (args.num_tokens - args.num_logits);
    if (row >= 0) args.out.logit_indices[row] = token;
  }
  for (int i = threadIdx.x; i < args.hidden; i += kThreads) {
    const std::size_t at = static_cast<std::size_t>(token) * args.hidden + i;
    store(args.out, at, args.residual[at]);
  }
}

}  // namespace

void engine_rows_async(const EngineRowsArgs& args, cudaStream_t stream) {
  assert(args.batch <= 32);
  launch(rows_kernel, dim3(args.num_rows), dim3(kThreads), 0, stream, false, args);
}

void engine_chunk_async(const EngineChunkArgs& args, cudaStream_t stream) {
  assert(args.num_logits >= 1 && args.num_logits <= args.num_tokens);
  launch(chunk_kernel, dim3(args.num_tokens), dim3(kThreads), 0, stream, false, args);
}

}  // namespace edgellm::kernels
