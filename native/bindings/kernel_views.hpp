// Python's arrays as the views that the kernels' launch functions take.
#pragma once

#include <cuda_runtime_api.h>

#include "device_array.hpp"
#include "edgellm/kernels/lora.hpp"
#include "edgellm/kernels/quantized.hpp"
#include "edgellm/kernels/types.hpp"

namespace edgellm {

inline cudaStream_t to_stream(std::uintptr_t stream) { return reinterpret_cast<cudaStream_t>(stream); }

inline void check_group(int group, std::int64_t cols) {
  if ((group != 16 && group != 32 && group != 64 && group != 128) || cols % group != 0) {
    throw std::invalid_argument("group " + std::to_string(group) + " must be 16, 32, 64 or 128 and divide cols " +
                                std::to_string(cols));
  }
}

// (format, data, scales or None, rows, cols, group); int4 is the repacked pair.
struct WeightTuple {
  kernels::WeightView view;

  explicit WeightTuple(const pybind11::tuple& t) {
    if (t.size() != 6) throw std::invalid_argument("a weight is (format, data, scales, rows, cols, group)");
    view.format = t[0].cast<kernels::WeightFormat>();
    view.rows = t[3].cast<int>(), view.cols = t[4].cast<int>(), view.group = t[5].cast<int>();
    if (view.cols % 16 != 0)
      throw std::invalid_argument("cols " + std::to_string(view.cols) + " is not a multiple of 16");
    const pybind11::object data = t[1], scales = t[2];
    const std::int64_t rows = view.rows, cols = view.cols;
    switch (view.format) {
      case kernels::WeightFormat::bf16:
        view.data = required<const __nv_bfloat16>(data, "weight", {rows, cols});
        break;
      case kernels::WeightFormat::fp16:
        view.data = required<const __half>(data, "weight", {rows, cols});
        break;
      case kernels::WeightFormat::fp8:
        view.data = required<const std::uint8_t>(data, "weight", {rows, cols});
        view.scales = required<const float>(scales, "scales", {rows});
        break;
      case kernels::WeightFormat::int8:
        check_group();
        view.data = required<const std::int8_t>(data, "weight", {rows, cols});
        view.scales = required<const __half>(scales, "scales", {rows, cols / view.group});
        break;
      case kernels::WeightFormat::int8_offset:
        check_group();
        view.data = required<const std::int8_t>(data, "weight", {rows, cols});
        view.scales = required<const __half>(scales, "scales", {rows, cols / view.group, 2});
        break;
      case kernels::WeightFormat::fp8_blocks:
        check_group();
        if (view.group < 64) throw std::invalid_argument("fp8_blocks needs groups of 64 or 128");
        view.data = required<const std::uint8_t>(data, "weight", {rows, cols});
        view.scales = required<const float>(scales, "scales", {rows, cols / view.group});
        break;
      case kernels::WeightFormat::int4: {
        check_group();
        const auto data_bytes = static_cast<std::int64_t>(kernels::int4_packed_data_bytes(view.rows, view.cols));
        const auto scales_bytes =
            static_cast<std::int64_t>(kernels::int4_packed_scales_bytes(view.rows, view.cols, view.group));
        view.data = required<const std::uint8_t>(data, "weight", {data_bytes});
        view.scales = required<const std::uint8_t>(scales, "scales", {scales_bytes});
        break;
      }
    }
  }

 private:
  void check_group() const { edgellm::check_group(view.group, view.cols); }
};

// A number for each feature, which kernels load 16 bytes at a time; None is null.
inline const float* features(const pybind11::object& object, const char* name, std::int64_t width) {
  const auto* values = optional<const float>(object, name, {width});
  if (reinterpret_cast<std::uintptr_t>(values) % 16 != 0) DeviceArray(object, name).fail("must be 16-byte aligned");
  return values;
}

// Both or none.
inline kernels::ProductScales product_scales(const pybind11::object& rows, const pybind11::object& columns,
                                             std::int64_t num_tokens, std::int64_t width) {
  if (rows.is_none() != columns.is_none()) throw std::invalid_argument("row_scales and column_scales go together");
  kernels::ProductScales scales;
  scales.rows = optional<const float>(rows, "row_scales", {num_tokens});
  scales.columns = features(columns, "column_scales", width);
  return scales;
}

// (linears uint8 (adapters, 48) of lora_linear's bytes, adapters int32 (num_tokens), h float32 (num_tokens, stride)).
inline kernels::LoraView lora_view(const pybind11::tuple& t, std::int64_t num_tokens) {
  if (t.size() != 3) throw std::invalid_argument("lora is (linears, adapters, h)");
  kernels::LoraView view;
  view.linears = reinterpret_cast<const kernels::LoraLinear*>(
      required<const std::uint8_t>(t[0], "linears", {-1, sizeof(kernels::LoraLinear)}));
  view.adapters = required<const std::int32_t>(t[1], "adapters", {num_tokens});
  const DeviceArray h(t[2], "h");
  view.h = h.as<float>({num_tokens, -1});
  view.h_stride = static_cast<int>(h.size(1));
  if (view.h_stride % 4 != 0) h.fail("must have a multiple of 4 columns");
  return view;
}

// (slots, 2, kv_heads, capacity, head_dim): bfloat16, float16, or uint8 that holds E4M3.
inline kernels::KvLayer kv_layer(const pybind11::object& object) {
  const DeviceArray cache(object, "kv");
  if (cache.rank() != 5 || cache.size(1) != 2) cache.fail("must be (slots, 2, kv_heads, capacity, head_dim)");
  kernels::KvLayer kv;
  const bool is_half = cache.is_float() && cache.bits() == 16;
  if (!cache.is_bfloat() && !is_half && cache.bits() != 8) cache.fail("must be bfloat16, float16 or uint8");
  kv.format = cache.is_bfloat() ? kernels::KvFormat::bf16 : is_half ? kernels::KvFormat::fp16 : kernels::KvFormat::fp8;
  kv.data = cache.raw();
  kv.num_kv_heads = static_cast<int>(cache.size(2));
  kv.capacity = static_cast<int>(cache.size(3));
  kv.head_dim = static_cast<int>(cache.size(4));
  if (kv.num_kv_heads < 1 || kv.capacity < 1 || kv.head_dim < 1) cache.fail("has no heads or no positions");
  return kv;
}

inline kernels::RopeTables rope_tables(const pybind11::object& cos, const pybind11::object& sin,
                                       const pybind11::object& q_gain, const pybind11::object& k_gain, float norm_eps,
                                       const kernels::KvLayer& kv) {
  kernels::RopeTables rope;
  rope.cos = required<const float>(cos, "cos", {-1, kv.head_dim / 2});
  rope.sin = required<const float>(sin, "sin", {-1, kv.head_dim / 2});
  rope.q_gain = optional<const __nv_bfloat16>(q_gain, "q_gain", {kv.head_dim});
  rope.k_gain = optional<const __nv_bfloat16>(k_gain, "k_gain", {kv.head_dim});
  rope.norm_eps = norm_eps;
  return rope;
}

}  // namespace edgellm
