// The linear KV cache of fixed slots: where a layer's part is, and copies of prefixes between slots and the host.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>

#include "edgellm/decoder_config.hpp"

namespace edgellm {

// A view of [layers, slots, 2, kv_heads, capacity, head_dim] in device memory, in config.kv_format, that something else
// owns. A prefix on the host is [layers, 2, kv_heads, length, head_dim].
class KvCache {
 public:
  KvCache(std::byte* data, const DecoderConfig& config);

  kernels::KvLayer layer(int layer) const;
  std::size_t prefix_bytes(int length) const { return static_cast<std::size_t>(length) * bytes_per_token_; }

  void copy_prefix_async(int source, int target, int length, cudaStream_t stream) const;
  void save_prefix_async(int slot, int length, std::byte* host, cudaStream_t stream) const;
  void load_prefix_async(int slot, int length, const std::byte* host, cudaStream_t stream) const;
  // All zeros, so that what was never written is at least finite.
  void clear_async(cudaStream_t stream) const;

 private:
  cudaPitchedPtr slot(int index) const;
  cudaPitchedPtr prefix(std::byte* host, int length) const;
  void copy_async(cudaPitchedPtr from, cudaPitchedPtr to, int length, cudaMemcpyKind kind, cudaStream_t stream) const;

  std::byte* data_;
  int num_layers_;
  int num_slots_;
  int num_kv_heads_;
  int capacity_;
  int head_dim_;
  kernels::KvFormat format_;
  std::size_t row_bytes_;    // one head's token
  std::size_t layer_bytes_;  // all slots
  std::size_t bytes_per_token_;
};

}  // namespace edgellm
