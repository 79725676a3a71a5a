// EdgeLLMInt4Gemm and EdgeLLMInt8Gemm: y = W x with weights of 4 or 8 bits in groups that share a scale.
//
// Inputs: x [..., cols] fp16 or bf16; weight INT8 and scales fp16; with bias: [rows] fp32.
// Output: y [..., rows] of x's type, or fp32 with float_output.
// Weights of 8 bits are as a bundle stores them: [rows, cols], scales [rows, cols / group]. Those of 4 bits are in the
// order of the tensor cores' fragments (kernels/quantized.cu): [tiles, blocks, 512] and scales [tiles, groups, 16], for
// tiles of 16 rows and blocks of 64 columns; `edgellm build` brings them into it.
// Up to 64 tokens go through the decode kernels, 16 at a time; more are a prompt (prompt_products.hpp).
#pragma once

#include <type_traits>

#include "plugin_base.hpp"

namespace edgellm::plugins {

struct GemmSettings {
  std::int32_t rows = 0;   // output features
  std::int32_t cols = 0;   // input features
  std::int32_t group = 0;  // input features that share a scale
  std::int32_t bias = 0;
  std::int32_t float_output = 0;
};

template <int kBits>
class GemmPlugin final : public PluginBase<GemmPlugin<kBits>, GemmSettings> {
 public:
  static_assert(kBits == 4 || kBits == 8);
  static constexpr const char* kName = kBits == 4 ? "EdgeLLMInt4Gemm" : "EdgeLLMInt8Gemm";
  static std::vector<Field<GemmSettings>> fields();
  explicit GemmPlugin(const GemmSettings& settings);

  std::int32_t getNbOutputs() const noexcept override { return 1; }
  std::int32_t getOutputDataTypes(nvinfer1::DataType* out, std::int32_t num_out, const nvinfer1::DataType* in,
                                  std::int32_t num_in) const noexcept override;
  std::int32_t getOutputShapes(const nvinfer1::DimsExprs* in, std::int32_t num_in, const nvinfer1::DimsExprs*,
                               std::int32_t, nvinfer1::DimsExprs* out, std::int32_t num_out,
                               nvinfer1::IExprBuilder& builder) noexcept override;
  std::int32_t enqueue(const nvinfer1::PluginTensorDesc* in, const nvinfer1::PluginTensorDesc* out,
                       const void* const* inputs, void* const* outputs, void* workspace,
                       cudaStream_t stream) noexcept override;

  std::int32_t num_inputs() const { return 3 + this->settings_.bias; }
  void check_tensors(const nvinfer1::PluginTensorDesc* in, std::int32_t num_in, const nvinfer1::PluginTensorDesc* out,
                     std::int32_t num_out) const;
  template <class TypeOf>
  bool takes(int position, std::int32_t num_in, TypeOf type) const;
  std::size_t workspace_bytes(const nvinfer1::DynamicPluginTensorDesc* in) const;
};

template <int kBits>
template <class TypeOf>
bool GemmPlugin<kBits>::takes(int position, std::int32_t num_in, TypeOf type) const {
  using nvinfer1::DataType;
  if (num_in != num_inputs()) return false;
  const DataType here = type(position);
  if (position == 0) return here == DataType::kHALF || here == DataType::kBF16;
  if (position == 1) return here == DataType::kINT8;
  if (position == 2) return here == DataType::kHALF;
  if (position < num_in) return here == DataType::kFLOAT;
  return here == (this->settings_.float_output ? DataType::kFLOAT : type(0));
}

extern template class GemmPlugin<4>;
extern template class GemmPlugin<8>;

}  // namespace edgellm::plugins
