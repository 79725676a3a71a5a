// Owns what another library exports by DLPack: checked to be dense, and released when it goes.
#pragma once

#include <pybind11/pybind11.h>

#include <algorithm>
#include <cstdint>
#include <span>
#include <stdexcept>
#include <string>
#include <utility>

#include "dlpack.hpp"

namespace edgellm::dlpack {

// Row-major without gaps: the last axis' stride is `unit`. Nobody follows the strides of an empty array, and libraries
// differ in what they write there.
inline bool is_dense(std::span<const std::int64_t> shape, const std::int64_t* strides, std::int64_t unit) {
  if (std::find(shape.begin(), shape.end(), 0) != shape.end()) return true;
  for (std::size_t i = shape.size(); i-- > 0;) {
    if (shape[i] > 1 && strides[i] != unit) return false;
    unit *= shape[i];
  }
  return true;
}

class Imported {
 public:
  // stream: where the memory will be used, which waits for the producer's work; 1 is the legacy default stream, and
  // -1 says that the caller orders the work. Throws std::invalid_argument that begins with `name`.
  Imported(const pybind11::object& object, const std::string& name, std::intptr_t stream) {
    namespace py = pybind11;
    py::object capsule;
    const py::object method = object.attr("__dlpack__");
    try {
      capsule = method(py::arg("stream") = stream, py::arg("max_version") = py::make_tuple(1, 0));
    } catch (const py::error_already_set& error) {
      if (!error.matches(PyExc_TypeError)) throw;  // a producer from before version 1 does not know max_version
      capsule = method(py::arg("stream") = stream);
    }
    take(capsule.ptr(), name);
    try {
      check_dense(name);
    } catch (...) {
      release();
      throw;
    }
  }
  Imported(Imported&& other) noexcept
      : plain_(std::exchange(other.plain_, nullptr)), versioned_(std::exchange(other.versioned_, nullptr)) {}
  Imported& operator=(Imported&&) = delete;
  Imported(const Imported&) = delete;
  Imported& operator=(const Imported&) = delete;
  ~Imported() { release(); }

  const DLTensor& tensor() const noexcept { return versioned_ != nullptr ? versioned_->dl_tensor : plain_->dl_tensor; }
  char* data() const noexcept { return static_cast<char*>(tensor().data) + tensor().byte_offset; }
  // Before version 1 a producer could not say so.
  bool read_only() const noexcept { return versioned_ != nullptr && (versioned_->flags & kReadOnly) != 0; }

 private:
  // A capsule is consumed by renaming it; from then on its tensor is ours to release.
  void take(PyObject* capsule, const std::string& name) {
    if (PyCapsule_IsValid(capsule, kVersionedCapsule) != 0) {
      auto* managed = static_cast<DLManagedTensorVersioned*>(PyCapsule_GetPointer(capsule, kVersionedCapsule));
      if (managed->version.major != 1) {
        throw std::invalid_argument(name + " comes as DLPack version " + std::to_string(managed->version.major) +
                                    "; 0 and 1 are understood");
      }
      PyCapsule_SetName(capsule, kUsedVersionedCapsule);
      versioned_ = managed;
    } else if (PyCapsule_IsValid(capsule, kCapsule) != 0) {
      plain_ = static_cast<DLManagedTensor*>(PyCapsule_GetPointer(capsule, kCapsule));
      PyCapsule_SetName(capsule, kUsedCapsule);
    } else {
      throw std::invalid_argument(name + " has a __dlpack__ that returns no DLPack capsule");
    }
  }

  void check_dense(const std::string& name) const {
    const DLTensor& view = tensor();
    if (view.dtype.lanes != 1) throw std::invalid_argument(name + " has a vector type");
    if (view.strides != nullptr && !is_dense({view.shape, static_cast<std::size_t>(view.ndim)}, view.strides, 1)) {
      throw std::invalid_argument(name + " is not contiguous");
    }
  }

  void release() noexcept {
    if (plain_ != nullptr && plain_->deleter != nullptr) plain_->deleter(plain_);
    if (versioned_ != nullptr && versioned_->deleter != nullptr) versioned_->deleter(versioned_);
    plain_ = nullptr;
    versioned_ = nullptr;
  }

  DLManagedTensor* plain_ = nullptr;
  DLManagedTensorVersioned* versioned_ = nullptr;  // at most one of the two
};

}  // namespace edgellm::dlpack
