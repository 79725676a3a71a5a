// Embeddings, positions, places, wanted rows and masks for a TensorRT engine.
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
    if (args.out.tree_masks != nullptr) args.out.tree_masks[row] = 1;
  }
  for (int i = threadIdx.x; i < args.hidden; i += kThreads) {
    const float value = found < 0 ? 0.0f : args.residual[static_cast<std::size_t>(found) * args.hidden + i];
    store(args.out, static_cast<std::size_t>(row) * args.hidden + i, value);
  }
}

__global__ void __launch_bounds__(kThreads) chunk_kernel(const EngineChunkArgs args) {
  wait_for_predecessor();
  const int token = blockIdx.x, start = args.start != nullptr ? *args.start : args.position;
  if (threadIdx.x == 0) {
    args.out.positions[token] = start + (args.depths != nullptr ? args.depths[token] : token);
    if (args.out.tree_masks != nullptr) {
      // Of more than 64 tokens the masks do not count.
      const std::uint64_t before = token < 63 ? (std::uint64_t{2} << token) - 1 : ~std::uint64_t{0};
      args.out.tree_masks[token] = static_cast<std::int64_t>(args.masks != nullptr ? args.masks[token] : before);
    }
    if (token == 0) args.out.write_indices[0] = start;
    const int row = token - (args.num_tokens - args.num_logits);
    if (row >= 0) args.out.logit_indices[row] = token;
  }
  for (int i = threadIdx.x; i < args.hidden; i += kThreads) {
    const std::size_t at = static_cast<std::size_t>(token) * args.hidden + i;
    store(args.out, at, args.residual[at]);
  }
}

// Most negative in fp16, and as large in bf16: no score comes near it, and it stays finite.
constexpr float kMasked = -65504.0f;

// A block a token.
__global__ void __launch_bounds__(kThreads) mask_kernel(const EngineMaskArgs args) {
  wait_for_predecessor();
  const int token = blockIdx.x;
  const auto position = static_cast<int>(args.positions[token]);
  const int first = args.window > 0 ? position - args.window + 1 : 0;  // position that it still sees
  const std::uint64_t seen = args.tree != nullptr ? args.tree[token] : 0;
  const int prefix = args.start != nullptr ? *args.start : args.prefix;
  const std::size_t row = static_cast<std::size_t>(token) * args.capacity;
  for (int place = threadIdx.x; place < args.capacity; place += kThreads) {
    bool visible = place <= position && place >= first;
    if (args.tree != nullptr) {
      const int node = place - prefix;
      visible = node < 0 ? place >= first
                         : node < args.num_tokens && (seen >> node & 1) != 0 && args.positions[node] >= first;
    }
    const float value = visible ? 0.0f : kMasked;
    if (args.is_bf16) {
      static_cast<bf16*>(args.mask)[row + place] = __float2bfloat16(value);
    } else {
      static_cast<__half*>(args.mask)[row + place] = __float2half(value);
    }
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

void engine_mask_async(const EngineMaskArgs& args, cudaStream_t stream) {
  assert(args.tree == nullptr || args.num_tokens <= 64);
  launch(mask_kernel, dim3(args.num_tokens), dim3(kThreads), 0, stream, false, args);
}

}  // namespace edgellm::kernels
