// Device memory of another CUDA library, through DLPack, checked before a kernel sees its pointer.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime_api.h>
#include <pybind11/pybind11.h>

#include <cstdint>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "dlpack_import.hpp"

namespace edgellm {

class DeviceArray {
 public:
  // -1: no synchronisation; launches are ordered by the stream that the caller names.
  DeviceArray(const pybind11::object& object, std::string name) : name_(std::move(name)), imported_(object, name_, -1) {
    if (tensor().device.device_type != dlpack::kCuda) fail("is not in device memory");
    int current = 0;
    if (cudaGetDevice(&current) == cudaSuccess && tensor().device.device_id != current) {
      fail("is on GPU " + std::to_string(tensor().device.device_id) + ", and this thread's is GPU " +
           std::to_string(current));
    }
  }

  int rank() const { return tensor().ndim; }
  std::int64_t size(int axis) const {
    if (axis >= rank()) fail("has too few dimensions");
    return tensor().shape[axis];
  }
  int bits() const { return tensor().dtype.bits; }
  bool is_float() const { return tensor().dtype.code == dlpack::kFloat; }
  bool is_bfloat() const { return tensor().dtype.code == dlpack::kBfloat; }

  // The data as T; integers may be signed or not. An extent of -1 is any; the sizes are the caller's contract.
  template <class T>
  T* as(const std::vector<std::int64_t>& shape) const {
    using Plain = std::remove_const_t<T>;
    const dlpack::DLDataType dtype = tensor().dtype;
    const bool floating = std::is_same_v<Plain, float> || std::is_same_v<Plain, __half>;
    const bool fits = std::is_same_v<Plain, __nv_bfloat16> ? is_bfloat()
                      : floating                           ? is_float()
                                                           : dtype.code == dlpack::kInt || dtype.code == dlpack::kUInt;
    if (!fits || dtype.bits != 8 * sizeof(Plain)) {
      fail("has DLPack type (" + std::to_string(dtype.code) + ", " + std::to_string(dtype.bits) + " bits), not " +
           type_name<Plain>());
    }
    bool same = rank() == static_cast<int>(shape.size());
    for (int i = 0; same && i < rank(); ++i)
      same = shape[static_cast<std::size_t>(i)] < 0 || shape[static_cast<std::size_t>(i)] == size(i);
    if (!same)
      fail("has shape " + text(tensor().shape, rank()) + ", not " + text(shape.data(), static_cast<int>(shape.size())));
    if (!std::is_const_v<T> && imported_.read_only()) fail("is read-only");
    return reinterpret_cast<T*>(raw());
  }

  char* raw() const { return imported_.data(); }
  std::int64_t num_bytes() const {
    std::int64_t bytes = bits() / 8;
    for (int i = 0; i < rank(); ++i) bytes *= size(i);
    return bytes;
  }

  [[noreturn]] void fail(const std::string& what) const { throw std::invalid_argument(name_ + " " + what); }

 private:
  template <class T>
  static std::string type_name() {
    if (std::is_same_v<T, __nv_bfloat16>) return "bfloat16";
    if (std::is_same_v<T, __half>) return "float16";
    if (std::is_same_v<T, float>) return "float32";
    return std::to_string(8 * sizeof(T)) + "-bit integers";
  }
  static std::string text(const std::int64_t* dims, int rank) {
    std::string out = "[";
    for (int i = 0; i < rank; ++i) out += (i ? ", " : "") + (dims[i] < 0 ? "any" : std::to_string(dims[i]));
    return out + "]";
  }

  const dlpack::DLTensor& tensor() const { return imported_.tensor(); }

  std::string name_;
  dlpack::Imported imported_;  // goes before the launch: the caller's own reference keeps the memory
};

// None is null.
template <class T>
T* optional(const pybind11::object& object, const char* name, const std::vector<std::int64_t>& shape) {
  return object.is_none() ? nullptr : DeviceArray(object, name).as<T>(shape);
}
template <class T>
T* required(const pybind11::object& object, const char* name, const std::vector<std::int64_t>& shape) {
  return DeviceArray(object, name).as<T>(shape);
}

}  // namespace edgellm
