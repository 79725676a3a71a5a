#include "edgellm/memory.hpp"

#include <atomic>
#include <utility>

#include "edgellm/cuda_try.hpp"

namespace edgellm {
namespace {

std::atomic<std::uint64_t> num_device_allocations{0};
std::atomic<std::uint64_t> num_pinned_allocations{0};

}  // namespace

AllocationCount allocation_count() noexcept { return {num_device_allocations, num_pinned_allocations}; }

DeviceMemory device_memory() {
  DeviceMemory memory;
  EDGELLM_CUDA_TRY(cudaMemGetInfo(&memory.free, &memory.total));
  return memory;
}

DeviceBuffer::DeviceBuffer(std::size_t num_bytes) : size_(num_bytes) {
  if (num_bytes == 0) return;
  void* data = nullptr;
  EDGELLM_CUDA_TRY(cudaMalloc(&data, num_bytes));
  data_ = static_cast<std::byte*>(data);
  ++num_device_allocations;
}

DeviceBuffer::DeviceBuffer(DeviceBuffer&& other) noexcept
    : data_(std::exchange(other.data_, nullptr)), size_(std::exchange(other.size_, 0)) {}

DeviceBuffer& DeviceBuffer::operator=(DeviceBuffer&& other) noexcept {
  std::swap(data_, other.data_);
  std::swap(size_, other.size_);
  return *this;
}

DeviceBuffer::~DeviceBuffer() {
  if (data_ != nullptr) EDGELLM_CUDA_WARN(cudaFree(data_));
}

PinnedBuffer::PinnedBuffer(std::size_t num_bytes) : size_(num_bytes) {
  if (num_bytes == 0) return;
  void* data = nullptr;
  EDGELLM_CUDA_TRY(cudaHostAlloc(&data, num_bytes, cudaHostAllocMapped));
  data_ = static_cast<std::byte*>(data);
  ++num_pinned_allocations;
  void* device_data = nullptr;
  const cudaError_t code = cudaHostGetDevicePointer(&device_data, data, 0);
  if (code != cudaSuccess) {
    EDGELLM_CUDA_WARN(cudaFreeHost(data));  // the destructor does not run when a constructor throws
    throw_cuda_error(code, "cudaHostGetDevicePointer", __FILE__, __LINE__);
  }
  device_data_ = static_cast<std::byte*>(device_data);
}

PinnedBuffer::PinnedBuffer(PinnedBuffer&& other) noexcept
    : data_(std::exchange(other.data_, nullptr)),
      device_data_(std::exchange(other.device_data_, nullptr)),
      size_(std::exchange(other.size_, 0)) {}

PinnedBuffer& PinnedBuffer::operator=(PinnedBuffer&& other) noexcept {
  std::swap(data_, other.data_);
  std::swap(device_data_, other.device_data_);
  std::swap(size_, other.size_);
  return *this;
}

PinnedBuffer::~PinnedBuffer() {
  if (data_ != nullptr) EDGELLM_CUDA_WARN(cudaFreeHost(data_));
}

}  // namespace edgellm
