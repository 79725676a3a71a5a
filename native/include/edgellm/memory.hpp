// The only places that take device or pinned memory, so that a test can count that generating takes none.
#pragma once

#include <cstddef>
#include <cstdint>

namespace edgellm {

// Allocations since the process began.
struct AllocationCount {
  std::uint64_t device = 0;
  std::uint64_t pinned = 0;
};
AllocationCount allocation_count() noexcept;

// Free and total bytes of the current device.
struct DeviceMemory {
  std::size_t free = 0;
  std::size_t total = 0;
};
DeviceMemory device_memory();

// Owns device memory; 256-byte aligned, as cudaMalloc gives it.
class DeviceBuffer {
 public:
  DeviceBuffer() = default;
  explicit DeviceBuffer(std::size_t num_bytes);
  DeviceBuffer(DeviceBuffer&& other) noexcept;
  DeviceBuffer& operator=(DeviceBuffer&& other) noexcept;
  DeviceBuffer(const DeviceBuffer&) = delete;
  DeviceBuffer& operator=(const DeviceBuffer&) = delete;
  ~DeviceBuffer();

  std::byte* data() const noexcept { return data_; }
  std::size_t size() const noexcept { return size_; }

 private:
  std::byte* data_ = nullptr;
  std::size_t size_ = 0;
};

// Owns page-locked host memory that the device can read and write in place (`device_data`) or by asynchronous copies.
class PinnedBuffer {
 public:
  PinnedBuffer() = default;
  explicit PinnedBuffer(std::size_t num_bytes);
  PinnedBuffer(PinnedBuffer&& other) noexcept;
  PinnedBuffer& operator=(PinnedBuffer&& other) noexcept;
  PinnedBuffer(const PinnedBuffer&) = delete;
  PinnedBuffer& operator=(const PinnedBuffer&) = delete;
  ~PinnedBuffer();

  std::byte* data() const noexcept { return data_; }
  std::byte* device_data() const noexcept { return device_data_; }
  std::size_t size() const noexcept { return size_; }
  template <typename T>
  T* as() const noexcept {
    return reinterpret_cast<T*>(data_);
  }
  template <typename T>
  T* device_as() const noexcept {
    return reinterpret_cast<T*>(device_data_);
  }

 private:
  std::byte* data_ = nullptr;
  std::byte* device_data_ = nullptr;
  std::size_t size_ = 0;
};

}  // namespace edgellm
