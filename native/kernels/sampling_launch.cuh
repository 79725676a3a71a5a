// How sampling and acceptance of drafts are launched: a cluster of blocks a row of logits, which they keep in shared
// memory, or one block.
#pragma once

#include "launch.hpp"
#include "sampling_cluster.cuh"

namespace edgellm::kernels {

struct RowBlocks {
  int size;   // blocks a row
  int share;  // logits of one
  bool in_shared;
  std::size_t shared_bytes;
};

// static_bytes: what the kernel's blocks have of shared memory beside.
inline RowBlocks blocks_of_row(const void* kernel, int vocab, std::size_t static_bytes) {
  const std::size_t most = device_traits().max_shared_bytes - static_bytes - 1024;
  // Always the most: another thread may be launching the same kernel for a larger vocabulary.
  EDGELLM_CUDA_TRY(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(most)));
  const auto blocks = [&](int size) {
    const int share = ceil_div(vocab, size);
    const std::size_t wanted = static_cast<std::size_t>(share) * sizeof(float);
    return RowBlocks{size, share, wanted <= most, wanted <= most ? wanted : 0};
  };
  const RowBlocks together = blocks(kSamplingBlocks);
  return runs_in_clusters(kernel, together.size, kSamplingThreads, together.shared_bytes) ? together : blocks(1);
}

template <class Params>
void launch_row_blocks(void (*kernel)(Params), const RowBlocks& blocks, unsigned rows, unsigned groups_of_rows,
                       cudaStream_t stream, bool pdl, const Params& params) {
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(blocks.size), rows, groups_of_rows);
  config.blockDim = dim3(kSamplingThreads);
  config.dynamicSmemBytes = blocks.shared_bytes;
  config.stream = stream;
  cudaLaunchAttribute attributes[2] = {};
  if (blocks.size > 1) {
    attributes[config.numAttrs].id = cudaLaunchAttributeClusterDimension;
    attributes[config.numAttrs++].val.clusterDim = {static_cast<unsigned>(blocks.size), 1, 1};
  }
  if (pdl && device_traits().has_dependent_launch) {
    attributes[config.numAttrs].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[config.numAttrs++].val.programmaticStreamSerializationAllowed = 1;
  }
  config.attrs = attributes;
  EDGELLM_CUDA_TRY(cudaLaunchKernelEx(&config, kernel, params));
  EDGELLM_CUDA_TRY(cudaGetLastError());
}

}  // namespace edgellm::kernels
