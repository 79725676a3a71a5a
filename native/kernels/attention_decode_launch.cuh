// How decode attention of one head_dim is launched: warps and clusters by the longest sequence and the GPU.
#pragma once

#include <algorithm>

#include "attention_decode.cuh"
#include "launch.hpp"

namespace edgellm::kernels {

// The largest cluster that the current device can run this kernel in: 8 or, without clusters, 1.
template <int HD, KvFormat F, int kWarps>
int largest_cluster() {
  thread_local int device = -1, largest = 1;
  const DeviceTraits& traits = device_traits();
  if (device == traits.device) return largest;
  int blocks = 1;
  if (traits.has_dependent_launch) {
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(kMaxCluster);
    config.blockDim = dim3(kWarps * 32);
    EDGELLM_CUDA_TRY(cudaOccupancyMaxPotentialClusterSize(&blocks, decode_attention_kernel<HD, F, kWarps>, &config));
  }
  largest = blocks >= kMaxCluster ? kMaxCluster : 1;
  device = traits.device;
  return largest;
}

template <int HD, KvFormat F, int kWarps>
void launch_decode_attention_warps(const DecodeAttentionArgs& args, DecodeAttentionParams params, cudaStream_t stream,
                                   bool pdl) {
  const int chunks = ceil_div(args.num_heads / args.kv.num_kv_heads, kTileHeads);
  // A long sequence's blocks have an SM each, and a GPU's parts have too few for clusters of all of them.
  const int wanted = kWarps == kLongWarps ? 1 : args.cluster > 0 ? args.cluster : kMaxCluster;
  const int splits = decode_attention_splits(args.most_attended, args.most_splits);
  params.cluster = std::min({wanted, largest_cluster<HD, F, kWarps>(), splits});
  const std::size_t rows = static_cast<std::size_t>(args.batch) * args.num_heads * splits;
  params.partial_tops = reinterpret_cast<float2*>(params.partial_out + rows * HD);
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(splits, args.kv.num_kv_heads * chunks, args.batch);
  config.blockDim = dim3(kWarps * 32);
  config.stream = stream;
  cudaLaunchAttribute attributes[2] = {};
  if (pdl && device_traits().has_dependent_launch) {
    attributes[config.numAttrs].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[config.numAttrs++].val.programmaticStreamSerializationAllowed = 1;
  }
  if (params.cluster > 1) {
    attributes[config.numAttrs].id = cudaLaunchAttributeClusterDimension;
    attributes[config.numAttrs++].val.clusterDim = {static_cast<unsigned>(params.cluster), 1, 1};
  }
  config.attrs = attributes;
  EDGELLM_CUDA_TRY(cudaLaunchKernelEx(&config, decode_attention_kernel<HD, F, kWarps>, params));
  EDGELLM_CUDA_TRY(cudaGetLastError());
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
