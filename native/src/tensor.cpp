#include "edgellm/tensor.hpp"

#include <algorithm>
#include <stdexcept>

namespace edgellm {
namespace {

struct Named {
  DType dtype;
  const char* name;
  std::size_t size;
};
constexpr std::array<Named, 8> kDTypes{{{DType::kFloat32, "float32", 4},
                                        {DType::kFloat16, "float16", 2},
                                        {DType::kBFloat16, "bfloat16", 2},
                                        {DType::kInt8, "int8", 1},
                                        {DType::kUInt8, "uint8", 1},
                                        {DType::kInt32, "int32", 4},
                                        {DType::kInt64, "int64", 8},
                                        {DType::kFloat8E4M3Fn, "float8_e4m3fn", 1}}};

}  // namespace

std::size_t size_of(DType dtype) noexcept { return kDTypes[static_cast<std::size_t>(dtype)].size; }

const char* name_of(DType dtype) noexcept { return kDTypes[static_cast<std::size_t>(dtype)].name; }

DType dtype_from_name(const std::string& name) {
  std::string known;
  for (const Named& entry : kDTypes) {
    if (name == entry.name) return entry.dtype;
    known += std::string(known.empty() ? "" : ", ") + entry.name;
  }
  throw std::invalid_argument("dtype is " + name + "; allowed are " + known);
}

Shape::Shape(std::span<const std::int64_t> dims) : rank_(static_cast<int>(dims.size())) {
  if (dims.size() > kMaxRank) {
    throw std::invalid_argument("a shape of rank " + std::to_string(dims.size()) + " exceeds " +
                                std::to_string(kMaxRank));
  }
  std::copy(dims.begin(), dims.end(), dims_.begin());
  if (std::any_of(dims.begin(), dims.end(), [](std::int64_t d) { return d < 0; })) {
    throw std::invalid_argument("shape " + to_string() + " has a negative size");
  }
  // So that no number of bytes is more than an int64 holds, and a tensor's end lies where its shape says.
  std::int64_t left = kMaxElements;
  for (const std::int64_t dim : dims) left /= std::max<std::int64_t>(dim, 1);
  if (left == 0) {
    throw std::invalid_argument("shape " + to_string() + " has more than " + std::to_string(kMaxElements) +
                                " elements");
  }
}

std::int64_t Shape::num_elements() const noexcept {
  std::int64_t count = 1;
  for (const std::int64_t dim : dims()) count *= dim;
  return count;
}

std::string Shape::to_string() const {
  std::string text = "[";
  for (int i = 0; i < rank_; ++i) text += (i > 0 ? ", " : "") + std::to_string((*this)[i]);
  return text + "]";
}

bool Shape::operator==(const Shape& other) const noexcept {
  return std::equal(dims().begin(), dims().end(), other.dims().begin(), other.dims().end());
}

Tensor::Tensor(DType dtype, const Shape& shape, MemoryKind kind) : shape_(shape), dtype_(dtype), kind_(kind) {
  capacity_ = num_bytes();
  if (kind == MemoryKind::kDevice) {
    device_ = DeviceBuffer(capacity_);
    data_ = device_.data();
  } else {
    pinned_ = PinnedBuffer(capacity_);
    data_ = pinned_.data();
  }
}

Tensor Tensor::borrow(void* data, DType dtype, const Shape& shape, MemoryKind kind) {
  Tensor tensor;
  tensor.data_ = static_cast<std::byte*>(data);
  tensor.shape_ = shape;
  tensor.dtype_ = dtype;
  tensor.kind_ = kind;
  tensor.capacity_ = tensor.num_bytes();
  return tensor;
}

void Tensor::reshape(const Shape& shape) {
  const std::size_t wanted = static_cast<std::size_t>(shape.num_elements()) * size_of(dtype_);
  if (wanted > capacity_) {
    throw std::invalid_argument("shape " + shape.to_string() + " needs " + std::to_string(wanted) +
                                " bytes; the tensor has " + std::to_string(capacity_));
  }
  shape_ = shape;
}

}  // namespace edgellm
