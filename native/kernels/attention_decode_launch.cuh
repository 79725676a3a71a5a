// How decode attention of one head_dim is launched: warps and clusters by the longest sequence and the GPU.
#pragma once

#include <algorithm>
#include <stdexcept>
#include <string>

#include "attention_decode.cuh"
#include "launch.hpp"

namespace edgellm::kernels {

// Beside what is counted: the new token's key and value, and barriers.
constexpr std::size_t kStaticSharedBytes = 2048;

// What a block takes of an SM's shared memory: also a kilobyte that is CUDA's own.
constexpr std::size_t block_shared_bytes(std::size_t dynamic_bytes) {
  return dynamic_bytes + kStaticSharedBytes + 1024;
}

// Blocks that share a KV head's query heads, and splits of a sequence that the launch has room for.
inline int num_chunks(const DecodeAttentionArgs& args) {
  return ceil_div(args.num_heads / args.kv.num_kv_heads, kTileHeads);
}
inline int launched_splits(const DecodeAttentionArgs& args) {
  return decode_attention_splits(args.most_attended, args.most_splits);
}

// Lets this kernel have as much shared memory as the current device gives a block, and asks for the largest cluster
// that it can run in: 8 or, without clusters, 1.
template <int HD, KvFormat F, int kWarps, bool kSeveral>
int largest_cluster() {
  thread_local int device = -1, largest = 1;
  const DeviceTraits& traits = device_traits();
  if (device == traits.device) return largest;
  const auto kernel = decode_attention_kernel<HD, F, kWarps, kSeveral>;
  static_assert(2 * HD * sizeof(typename Kv<F>::Element) + 64 <= kStaticSharedBytes);
  EDGELLM_CUDA_TRY(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                        static_cast<int>(traits.max_shared_bytes - kStaticSharedBytes)));
  const auto bytes =
      static_cast<std::size_t>(DecodeAttentionShared<HD, kSeveral>{kWarps, 1, kMaxCluster, kTileHeads * HD}.bytes());
  const auto* address = reinterpret_cast<const void*>(kernel);
  largest = runs_in_clusters(address, kMaxCluster, kWarps * 32, bytes) ? kMaxCluster : 1;
  device = traits.device;
  return largest;
}

// What a call with so many splits a block has of shared memory and of clusters: those of all of an eight, or none.
template <int HD, KvFormat F, int kWarps, bool kSeveral>
DecodeAttentionShared<HD, kSeveral> shared_of_blocks(const DecodeAttentionArgs& args, int each) {
  // A long sequence's blocks have an SM each, and a GPU's parts have too few for clusters of all of them.
  const int most = kWarps == kLongWarps ? 1 : args.cluster > 0 ? args.cluster : kMaxCluster;
  const int cluster = std::max(1, std::min(launched_splits(args), kMaxCluster) / each);
  const int heads = ceil_div(args.num_heads / args.kv.num_kv_heads, num_chunks(args));
  return {kWarps, each, cluster <= std::min(most, largest_cluster<HD, F, kWarps, kSeveral>()) ? cluster : 1,
          heads * HD};
}

// Blocks that an SM has room for, each with so much dynamic shared memory.
template <int HD, KvFormat F, int kWarps>
int most_blocks_per_sm(std::size_t dynamic_bytes) {
  const std::size_t bytes = block_shared_bytes(dynamic_bytes);
  const int with_room = std::max(1, static_cast<int>(device_traits().shared_bytes_of_sm / bytes));
  return std::min(with_room, kWarps == kLongWarps ? 1 : kBlocksPerSm<HD, F>);
}

template <int HD, KvFormat F, int kWarps, bool kSeveral>
void launch_decode_attention_blocks(const DecodeAttentionArgs& args, DecodeAttentionParams params,
                                    const DecodeAttentionShared<HD, kSeveral>& shared, cudaStream_t stream, bool pdl) {
  const int splits = launched_splits(args);
  const DeviceTraits& traits = device_traits();
  const bool is_dependent = traits.has_dependent_launch;
  params.splits_per_block = shared.num_splits;
  params.cluster = shared.cluster;
  if (!is_dependent) params.exchanged = nullptr;  // 128 bits at once came with clusters
  const std::size_t rows = static_cast<std::size_t>(args.batch) * args.num_heads * splits;
  params.partial_tops = reinterpret_cast<float2*>(params.partial_out + rows * HD);
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(splits / shared.num_splits, args.kv.num_kv_heads * num_chunks(args), args.batch);
  config.blockDim = dim3(kWarps * 32);
  config.dynamicSmemBytes = static_cast<std::size_t>(shared.bytes());
  config.stream = stream;
  cudaLaunchAttribute attributes[3] = {};
  if (pdl && is_dependent) {
    attributes[config.numAttrs].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[config.numAttrs++].val.programmaticStreamSerializationAllowed = 1;
  }
  if (params.cluster > 1) {
    attributes[config.numAttrs].id = cudaLaunchAttributeClusterDimension;
    attributes[config.numAttrs++].val.clusterDim = {static_cast<unsigned>(params.cluster), 1, 1};
  }
#if CUDART_VERSION >= 12050
  // Shared memory for the blocks that an SM gets, and no more. What is left is L1, through which their loads come; the
  // products of several tokens leave little of it, and an SM keeps what it has where no kernel asks for something else.
  // And an SM that the predecessor leaves early does not take two blocks where each can have one. Clusters of more than
  // two need that choice: a GPU's parts do not always have a multiple of four SMs.
  if (traits.has_launch_carveout && params.cluster <= 2) {
    const int num_blocks = static_cast<int>(config.gridDim.x * config.gridDim.y * config.gridDim.z);
    const int on_sm =
        std::min(ceil_div(num_blocks, traits.num_sms), most_blocks_per_sm<HD, F, kWarps>(config.dynamicSmemBytes));
    attributes[config.numAttrs].id = cudaLaunchAttributePreferredSharedMemoryCarveout;
    attributes[config.numAttrs++].val.sharedMemCarveout =
        static_cast<unsigned int>(shared_memory_percent(on_sm * block_shared_bytes(config.dynamicSmemBytes)));
  }
#endif
  config.attrs = attributes;
  EDGELLM_CUDA_TRY(cudaLaunchKernelEx(&config, decode_attention_kernel<HD, F, kWarps, kSeveral>, params));
  EDGELLM_CUDA_TRY(cudaGetLastError());
}

template <int HD, KvFormat F, int kWarps>
void launch_decode_attention_warps(const DecodeAttentionArgs& args, const DecodeAttentionParams& params,
                                   cudaStream_t stream, bool pdl) {
  const DeviceTraits& traits = device_traits();
  const int splits = launched_splits(args);
  const auto shared = [&](int each) { return shared_of_blocks<HD, F, kWarps, true>(args, each); };
  const auto fits = [&](int each) {
    return static_cast<std::size_t>(shared(each).bytes()) <= traits.max_shared_bytes - kStaticSharedBytes;
  };
  int each = args.splits_per_block;
  if (each == 0) {
    const auto alone = static_cast<std::size_t>(shared_of_blocks<HD, F, kWarps, false>(args, 1).bytes());
    const int most_blocks = most_blocks_per_sm<HD, F, kWarps>(alone);
    const int rows = args.batch * args.kv.num_kv_heads * num_chunks(args);
    each = decode_attention_splits_per_block(splits, rows, traits.num_sms, most_blocks);
    while (each > 1 && !fits(each)) each /= 2;
  }
  if (each > std::min(splits, kMaxCluster) || (each > 1 && !fits(each))) {
    throw std::invalid_argument("splits_per_block " + std::to_string(each) + " is more than " + std::to_string(splits) +
                                " splits, or than a block has room for");
  }
  if (each == 1) {
    const auto alone = shared_of_blocks<HD, F, kWarps, false>(args, each);
    return launch_decode_attention_blocks<HD, F, kWarps, false>(args, params, alone, stream, pdl);
  }
  launch_decode_attention_blocks<HD, F, kWarps, true>(args, params, shared(each), stream, pdl);
}

template <int HD, KvFormat F>
void launch_decode_attention(const DecodeAttentionArgs& args, const DecodeAttentionParams& params, cudaStream_t stream,
                             bool pdl) {
  if constexpr (has_long<HD>) {
    if (args.most_attended > kLongContext) {
      return launch_decode_attention_warps<HD, F, kLongWarps>(args, params, stream, pdl);
    }
  }
  launch_decode_attention_warps<HD, F, kAttentionWarps>(args, params, stream, pdl);
}

// One translation unit a head_dim.
template <int HD>
void launch_for_head_dim(const DecodeAttentionArgs& args, const DecodeAttentionParams& params, cudaStream_t stream,
                         bool pdl) {
  switch (args.kv.format) {
    case KvFormat::bf16:
      return launch_decode_attention<HD, KvFormat::bf16>(args, params, stream, pdl);
    case KvFormat::fp16:
      return launch_decode_attention<HD, KvFormat::fp16>(args, params, stream, pdl);
    case KvFormat::fp8:
      return launch_decode_attention<HD, KvFormat::fp8>(args, params, stream, pdl);
  }
}

}  // namespace edgellm::kernels
