// NumPy arrays as the native code takes them, and a memory plan as Python sees it.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <cstdint>
#include <span>
#include <stdexcept>
#include <string>
#include <vector>

#include "edgellm/arena.hpp"
#include "edgellm/decoder_config.hpp"
#include "edgellm/weights.hpp"

namespace edgellm {

using Ints = pybind11::array_t<std::int32_t, pybind11::array::c_style | pybind11::array::forcecast>;

inline std::span<const std::int32_t> span_of(const Ints& array) {
  return {array.data(), static_cast<std::size_t>(array.size())};
}

inline HostTensor host_tensor(const std::string& name, const pybind11::array& array) {
  if ((array.flags() & pybind11::array::c_style) == 0) throw std::invalid_argument(name + " is not contiguous");
  const std::vector<std::int64_t> dims(array.shape(), array.shape() + array.ndim());
  HostTensor host;
  host.data = array.data();
  host.dtype = dtype_from_name(pybind11::str(array.dtype().attr("name")));
  host.shape = Shape(std::span<const std::int64_t>(dims));
  return host;
}

inline pybind11::dict plan_to_dict(const MemoryPlan& plan) {
  pybind11::dict report;
  for (const auto& [group, num_bytes] : plan.groups()) report[pybind11::str(group)] = num_bytes;
  report["graphs"] = plan.set_aside();
  report["total"] = plan.total() + plan.set_aside();
  return report;
}

}  // namespace edgellm
