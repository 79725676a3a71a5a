#include "edgellm/kv_cache.hpp"

#include <cuda_runtime.h>

#include <cassert>

#include "edgellm/cuda_try.hpp"
#include "edgellm/kernels/kv_compact.hpp"

namespace edgellm {

KvCache::KvCache(std::byte* data, const DecoderConfig& config, KvOrder order, int capacity)
    : data_(data),
      order_(order),
      num_slices_(order == KvOrder::apart ? 2 * config.num_layers : config.num_layers),
      rows_per_slot_(order == KvOrder::apart ? config.num_kv_heads : 2 * config.num_kv_heads),
      num_slots_(config.num_slots),
      num_kv_heads_(config.num_kv_heads),
      capacity_(capacity),
      head_dim_(config.head_dim),
      format_(config.kv_format),
      row_bytes_(static_cast<std::size_t>(config.head_dim) * kernels::kv_element_bytes(config.kv_format)),
      slice_bytes_(static_cast<std::size_t>(num_slots_ * rows_per_slot_) * static_cast<std::size_t>(capacity_) *
                   row_bytes_),
      bytes_per_token_(config.kv_bytes_per_token()) {}

kernels::KvLayer KvCache::layer(int layer) const {
  assert(order_ == KvOrder::together);
  kernels::KvLayer view;
  view.data = data_ + static_cast<std::size_t>(layer) * slice_bytes_;
  view.format = format_;
  view.num_kv_heads = num_kv_heads_;
  view.capacity = capacity_;
  view.head_dim = head_dim_;
  return view;
}

std::byte* KvCache::tensor(int layer, int which, int slot) const {
  const int slice = order_ == KvOrder::apart ? 2 * layer + which : layer;
  return data_ + static_cast<std::size_t>(slice) * slice_bytes_ + static_cast<std::size_t>(slot) * slot_bytes();
}

// A slot as a 3D array: a token prefix is contiguous within a head, heads are one pitch apart, layers one slice.
cudaPitchedPtr KvCache::slot(int index) const {
  const std::size_t pitch = static_cast<std::size_t>(capacity_) * row_bytes_;
  std::byte* start = data_ + static_cast<std::size_t>(index * rows_per_slot_) * pitch;
  return make_cudaPitchedPtr(start, pitch, pitch, static_cast<std::size_t>(num_slots_ * rows_per_slot_));
}

cudaPitchedPtr KvCache::prefix(std::byte* host, int length) const {
  const std::size_t pitch = static_cast<std::size_t>(length) * row_bytes_;
  return make_cudaPitchedPtr(host, pitch, pitch, static_cast<std::size_t>(rows_per_slot_));
}

void KvCache::copy_async(cudaPitchedPtr from, cudaPitchedPtr to, int length, cudaMemcpyKind kind,
                         cudaStream_t stream) const {
  if (length == 0) return;
  cudaMemcpy3DParms copy{};
  copy.srcPtr = from;
  copy.dstPtr = to;
  copy.extent = make_cudaExtent(static_cast<std::size_t>(length) * row_bytes_, static_cast<std::size_t>(rows_per_slot_),
                                static_cast<std::size_t>(num_slices_));
  copy.kind = kind;
  EDGELLM_CUDA_TRY(cudaMemcpy3DAsync(&copy, stream));
}

void KvCache::copy_prefix_async(int source, int target, int length, cudaStream_t stream) const {
  copy_async(slot(source), slot(target), length, cudaMemcpyDeviceToDevice, stream);
}

void KvCache::save_prefix_async(int slot_index, int length, std::byte* host, cudaStream_t stream) const {
  copy_async(slot(slot_index), prefix(host, length), length, cudaMemcpyDeviceToHost, stream);
}

void KvCache::load_prefix_async(int slot_index, int length, const std::byte* host, cudaStream_t stream) const {
  // CUDA's struct has one pointer type for both directions; the source is only read.
  copy_async(prefix(const_cast<std::byte*>(host), length), slot(slot_index), length, cudaMemcpyHostToDevice, stream);
}

void KvCache::keep_path_async(const VerifyInputs& path, cudaStream_t stream) const {
  kernels::KvCompactArgs args;
  args.cache = data_;
  args.format = format_;
  args.num_slices = num_slices_;
  args.num_slots = num_slots_;
  args.num_heads = rows_per_slot_;
  args.capacity = capacity_;
  args.head_dim = head_dim_;
  args.slots = &path.slot;
  args.positions = &path.position;
  args.paths = path.token_ids;
  args.counts = path.starts;
  args.max_nodes = kMaxVerifyTokens;
  kernels::kv_compact_async(args, stream, false);
}

void KvCache::clear_async(cudaStream_t stream) const {
  EDGELLM_CUDA_TRY(cudaMemsetAsync(data_, 0, static_cast<std::size_t>(num_slices_) * slice_bytes_, stream));
}

}  // namespace edgellm
