// A typed, shaped piece of memory that either owns it or borrows it; contiguous, row-major, move-only.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <span>
#include <string>

#include "edgellm/memory.hpp"

namespace edgellm {

enum class DType : std::uint8_t { kFloat32, kFloat16, kBFloat16, kInt8, kUInt8, kInt32, kInt64, kFloat8E4M3Fn };
std::size_t size_of(DType dtype) noexcept;
const char* name_of(DType dtype) noexcept;       // "float32", "bfloat16", …
DType dtype_from_name(const std::string& name);  // throws std::invalid_argument

enum class MemoryKind : std::uint8_t { kDevice, kPinned };

// Up to six dimensions, held inline: reshaping takes no heap memory.
class Shape {
 public:
  static constexpr int kMaxRank = 6;
  static constexpr std::int64_t kMaxElements = std::int64_t{1} << 59;  // empty dimensions count as one
  Shape() = default;
  Shape(std::initializer_list<std::int64_t> dims) : Shape(std::span(dims.begin(), dims.size())) {}
  explicit Shape(std::span<const std::int64_t> dims);  // throws std::invalid_argument: rank, sizes

  int rank() const noexcept { return rank_; }
  std::int64_t operator[](int axis) const noexcept { return dims_[static_cast<std::size_t>(axis)]; }
  std::int64_t num_elements() const noexcept;
  std::span<const std::int64_t> dims() const noexcept { return {dims_.data(), static_cast<std::size_t>(rank_)}; }
  std::string to_string() const;  // "[2, 3]"
  bool operator==(const Shape& other) const noexcept;

 private:
  std::array<std::int64_t, kMaxRank> dims_{};
  int rank_ = 0;
};

class Tensor {
 public:
  // Takes memory of its own.
  Tensor(DType dtype, const Shape& shape, MemoryKind kind = MemoryKind::kDevice);
  // Uses `data`, which must outlive the tensor and hold the shape's bytes.
  static Tensor borrow(void* data, DType dtype, const Shape& shape, MemoryKind kind = MemoryKind::kDevice);

  Tensor(Tensor&&) noexcept = default;
  Tensor& operator=(Tensor&&) noexcept = default;
  Tensor(const Tensor&) = delete;
  Tensor& operator=(const Tensor&) = delete;
  ~Tensor() = default;

  // The same memory with another shape, which may be smaller than what was first allocated but never larger:
  // throws std::invalid_argument then. Never allocates.
  void reshape(const Shape& shape);

  std::byte* data() const noexcept { return data_; }
  template <typename T>
  T* as() const noexcept {
    return reinterpret_cast<T*>(data_);
  }
  DType dtype() const noexcept { return dtype_; }
  const Shape& shape() const noexcept { return shape_; }
  MemoryKind kind() const noexcept { return kind_; }
  bool owns() const noexcept { return device_.data() != nullptr || pinned_.data() != nullptr; }
  std::size_t num_bytes() const noexcept { return static_cast<std::size_t>(shape_.num_elements()) * size_of(dtype_); }
  std::size_t capacity_bytes() const noexcept { return capacity_; }

 private:
  Tensor() = default;

  DeviceBuffer device_;
  PinnedBuffer pinned_;
  std::byte* data_ = nullptr;
  std::size_t capacity_ = 0;
  Shape shape_;
  DType dtype_ = DType::kFloat32;
  MemoryKind kind_ = MemoryKind::kDevice;
};

}  // namespace edgellm
