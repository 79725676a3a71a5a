// The linear KV cache of fixed slots: where a layer's part is, and copies of prefixes between slots and the host.
// Slots have lengths of their own, which are not kept here: a step says the position that it writes, and sees what lies
// before it. So a slot is reset by starting over at position 0, and cut by writing at an earlier position.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>

#include "edgellm/decoder_config.hpp"
#include "edgellm/verify_inputs.hpp"

namespace edgellm {

// How K and V lie in the cache: [layers, slots, 2, kv_heads, capacity, head_dim], or, for an engine, which has them as
// tensors of their own, [layers, 2, slots, kv_heads, capacity, head_dim].
enum class KvOrder : std::uint8_t { together, apart };

// A view of that in device memory, in config.kv_format, that something else owns. A prefix on the host is
// [layers, 2, kv_heads, length, head_dim] of either.
class KvCache {
 public:
  KvCache(std::byte* data, const DecoderConfig& config) : KvCache(data, config, KvOrder::together, config.capacity) {}
  // capacity: of the cache, where it is more than what the configuration lets a slot hold.
  KvCache(std::byte* data, const DecoderConfig& config, KvOrder order, int capacity);

  // Of a cache that has them together.
  kernels::KvLayer layer(int layer) const;
  // A layer's part from `slot` on: K (0) or V (1), (slots, kv_heads, capacity, head_dim), where they are apart; both,
  // (slots, 2, kv_heads, capacity, head_dim), and `which` 0, where they are together.
  std::byte* tensor(int layer, int which, int slot) const;
  std::size_t slot_bytes() const { return static_cast<std::size_t>(rows_per_slot_ * capacity_) * row_bytes_; }
  std::size_t prefix_bytes(int length) const { return static_cast<std::size_t>(length) * bytes_per_token_; }

  void copy_prefix_async(int source, int target, int length, cudaStream_t stream) const;
  void save_prefix_async(int slot, int length, std::byte* host, cudaStream_t stream) const;
  void load_prefix_async(int slot, int length, const std::byte* host, cudaStream_t stream) const;
  // Moves an accepted path's tokens together. path, in device memory: see VerifyInputs.
  void keep_path_async(const VerifyInputs& path, cudaStream_t stream) const;
  // All zeros, so that what was never written is at least finite.
  void clear_async(cudaStream_t stream) const;

 private:
  cudaPitchedPtr slot(int index) const;
  cudaPitchedPtr prefix(std::byte* host, int length) const;
  void copy_async(cudaPitchedPtr from, cudaPitchedPtr to, int length, cudaMemcpyKind kind, cudaStream_t stream) const;

  std::byte* data_;
  KvOrder order_;
  int num_slices_;     // of the slots: layers, twice as many where K and V are apart
  int rows_per_slot_;  // KV heads in a slice, of K and V where they are together
  int num_slots_;
  int num_kv_heads_;
  int capacity_;
  int head_dim_;
  kernels::KvFormat format_;
  std::size_t row_bytes_;    // one head's token
  std::size_t slice_bytes_;  // all slots
  std::size_t bytes_per_token_;
};

}  // namespace edgellm
