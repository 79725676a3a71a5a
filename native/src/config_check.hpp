// What the checks of configurations share.
#pragma once

#include <stdexcept>
#include <string>

#include "edgellm/kernels/types.hpp"

namespace edgellm {

inline void require(bool condition, const std::string& message) {
  if (!condition) throw std::invalid_argument(message);
}

// Whether a format has scales for groups of columns.
inline bool is_grouped(kernels::WeightFormat format) {
  using kernels::WeightFormat;
  return format != WeightFormat::bf16 && format != WeightFormat::fp16 && format != WeightFormat::fp8;
}

}  // namespace edgellm
