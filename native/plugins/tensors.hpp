// Checks of what TensorRT hands to a plugin, whose errors name the tensor, and cutting a workspace into pieces.
#pragma once

#include <NvInferRuntime.h>

#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

namespace edgellm::plugins {

inline std::string to_text(const nvinfer1::Dims& dims) {
  std::string text = "[";
  for (std::int32_t i = 0; i < dims.nbDims; i++) text += (i ? ", " : "") + std::to_string(dims.d[i]);
  return text + "]";
}

inline std::string to_text(const std::vector<std::int64_t>& dims) {
  nvinfer1::Dims all{};
  all.nbDims = static_cast<std::int32_t>(dims.size());
  for (std::size_t i = 0; i < dims.size(); i++) all.d[i] = static_cast<decltype(all.d[0] + 0)>(dims[i]);
  return to_text(all);
}

// Throws std::invalid_argument unless the dims are `wanted`. -1 on either side is a size that is not known, or any.
inline void check_dims(const char* name, const nvinfer1::Dims& dims, const std::vector<std::int64_t>& wanted) {
  bool same = dims.nbDims == static_cast<std::int32_t>(wanted.size());
  for (std::size_t i = 0; same && i < wanted.size(); i++) {
    same = dims.d[i] < 0 || wanted[i] < 0 || dims.d[i] == wanted[i];
  }
  if (!same) {
    throw std::invalid_argument(std::string(name) + " is " + to_text(dims) + "; it must be " + to_text(wanted));
  }
}

inline void check_count(const char* what, std::int32_t count, std::int32_t wanted) {
  if (count != wanted) {
    throw std::invalid_argument(std::to_string(count) + " " + what + " for " + std::to_string(wanted) +
                                "; export the model again");
  }
}

// The largest that a dimension can become.
inline std::int64_t largest(const nvinfer1::DynamicPluginTensorDesc& tensor, std::int32_t axis) {
  const auto now = axis < tensor.desc.dims.nbDims ? tensor.desc.dims.d[axis] : 0;
  const auto most = axis < tensor.max.nbDims ? tensor.max.d[axis] : 0;
  return now > most ? now : most;
}

// Consecutive pieces of a workspace, each aligned to 256 bytes; without a start it only counts.
class Pieces {
 public:
  explicit Pieces(void* start) : start_(static_cast<std::byte*>(start)) {}

  template <class T>
  T* take(std::size_t count) {
    std::byte* at = start_ ? start_ + used_ : nullptr;
    used_ += (count * sizeof(T) + 255) / 256 * 256;
    return reinterpret_cast<T*>(at);
  }
  std::size_t used() const { return used_; }

 private:
  std::byte* start_;
  std::size_t used_ = 0;
};

}  // namespace edgellm::plugins
