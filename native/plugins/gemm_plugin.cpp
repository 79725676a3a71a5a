#include "gemm_plugin.hpp"

#include <algorithm>

#include "convert.hpp"
#include "edgellm/kernels/gemv.hpp"
#include "edgellm/kernels/quantized.hpp"
#include "prompt_products.hpp"

namespace edgellm::plugins {

using nvinfer1::DataType;
using nvinfer1::PluginTensorDesc;

namespace {

constexpr std::int64_t kTileRows = 16, kBlockCols = 64, kBlockBytes = 512;

std::int64_t num_tokens(const nvinfer1::Dims& dims) {
  std::int64_t count = 1;
  for (std::int32_t i = 0; i + 1 < dims.nbDims; i++) count *= dims.d[i];
  return count;
}

// Scratch of the tokens that are multiplied at a time, where the engine computes in fp16.
struct Scratch {
  Scratch(void* workspace, std::int32_t rows, std::int32_t cols) {
    Pieces pieces(workspace);
    x = pieces.take<__nv_bfloat16>(static_cast<std::size_t>(kernels::kMaxGemvTokens) * cols);
    y = pieces.take<float>(static_cast<std::size_t>(kernels::kMaxGemvTokens) * rows);
    used = pieces.used();
  }
  __nv_bfloat16* x;
  float* y;
  std::size_t used;
};

}  // namespace

template <int kBits>
std::vector<Field<GemmSettings>> GemmPlugin<kBits>::fields() {
  using S = GemmSettings;
  return {{"rows", &S::rows, nullptr, true},
          {"cols", &S::cols, nullptr, true},
          {"group", &S::group, nullptr, true},
          {"bias", &S::bias, nullptr, false},
          {"float_output", &S::float_output, nullptr, false}};
}

template <int kBits>
GemmPlugin<kBits>::GemmPlugin(const GemmSettings& settings) : PluginBase<GemmPlugin<kBits>, GemmSettings>(settings) {
  const auto refuse = [](const char* name, std::int32_t value, const char* allowed) {
    throw std::invalid_argument(std::string(name) + " is " + std::to_string(value) + "; allowed: " + allowed);
  };
  const GemmSettings& s = settings;
  if (s.rows < 1) refuse("rows", s.rows, "1 and more");
  if (s.group != 16 && s.group != 32 && s.group != 64 && s.group != 128) refuse("group", s.group, "16, 32, 64, 128");
  if (s.cols < 1 || s.cols % s.group != 0) refuse("cols", s.cols, "multiples of group");
  if (s.bias != 0 && s.bias != 1) refuse("bias", s.bias, "0, 1");
  if (s.float_output != 0 && s.float_output != 1) refuse("float_output", s.float_output, "0, 1");
}

template <int kBits>
std::int32_t GemmPlugin<kBits>::getOutputDataTypes(DataType* out, std::int32_t num_out, const DataType* in,
                                                   std::int32_t num_in) const noexcept {
  return guarded(kName, -1, [&] {
    check_count("inputs", num_in, num_inputs());
    check_count("outputs", num_out, 1);
    out[0] = this->settings_.float_output ? DataType::kFLOAT : in[0];
    return 0;
  });
}

template <int kBits>
std::int32_t GemmPlugin<kBits>::getOutputShapes(const nvinfer1::DimsExprs* in, std::int32_t num_in,
                                                const nvinfer1::DimsExprs*, std::int32_t, nvinfer1::DimsExprs* out,
                                                std::int32_t num_out, nvinfer1::IExprBuilder& builder) noexcept {
  return guarded(kName, -1, [&] {
    check_count("inputs", num_in, num_inputs());
    check_count("outputs", num_out, 1);
    out[0] = in[0];
    out[0].d[in[0].nbDims - 1] = builder.constant(this->settings_.rows);
    return 0;
  });
}

template <int kBits>
void GemmPlugin<kBits>::check_tensors(const PluginTensorDesc* in, std::int32_t num_in, const PluginTensorDesc* out,
                                      std::int32_t num_out) const {
  check_count("inputs", num_in, num_inputs());
  check_count("outputs", num_out, 1);
  const GemmSettings& s = this->settings_;
  if (in[0].dims.nbDims < 2) throw std::invalid_argument("x is " + to_text(in[0].dims) + "; it must have a token axis");
  std::vector<std::int64_t> x(in[0].dims.d, in[0].dims.d + in[0].dims.nbDims);
  x.back() = s.cols;
  check_dims("x", in[0].dims, x);
  if constexpr (kBits == 8) {
    check_dims("weight", in[1].dims, {s.rows, s.cols});
    check_dims("scales", in[2].dims, {s.rows, s.cols / s.group});
  } else {
    const std::int64_t tiles = (s.rows + kTileRows - 1) / kTileRows, blocks = (s.cols + kBlockCols - 1) / kBlockCols;
    if (in[1].dims.nbDims == 2) {
      throw std::invalid_argument("weight is " + to_text(in[1].dims) +
                                  ", the bundle's order; it must be packed: build with `edgellm build`");
    }
    check_dims("weight", in[1].dims, {tiles, blocks, kBlockBytes});
    const auto groups = static_cast<std::int64_t>(kernels::int4_packed_scales_bytes(s.rows, s.cols, s.group)) /
                        (tiles * kTileRows * static_cast<std::int64_t>(sizeof(__half)));
    check_dims("scales", in[2].dims, {tiles, groups, kTileRows});
  }
  if (s.bias) check_dims("bias", in[3].dims, {s.rows});
  x.back() = s.rows;
  check_dims("y", out[0].dims, x);
}

template <int kBits>
std::size_t GemmPlugin<kBits>::workspace_bytes(const nvinfer1::DynamicPluginTensorDesc* in) const {
  const GemmSettings& s = this->settings_;
  const bool half = in[0].desc.type == DataType::kHALF;
  std::int64_t most = 1;
  for (std::int32_t i = 0; i + 1 < in[0].desc.dims.nbDims; i++) most *= std::max<std::int64_t>(1, largest(in[0], i));
  const std::size_t few = half ? Scratch(nullptr, s.rows, s.cols).used : 0;
  return std::max(few, prompt_workspace_bytes(s.rows, s.cols, most, half ? Activation::fp16 : Activation::bf16));
}

template <int kBits>
std::int32_t GemmPlugin<kBits>::enqueue(const PluginTensorDesc* in, const PluginTensorDesc*, const void* const* inputs,
                                        void* const* outputs, void* workspace, cudaStream_t stream) noexcept {
  return guarded(kName, -1, [&] {
    const GemmSettings& s = this->settings_;
    const bool half = in[0].type == DataType::kHALF, as_float = half || s.float_output;
    const Scratch scratch(workspace, s.rows, s.cols);
    kernels::GemvArgs args;
    args.weight.format = kBits == 4 ? kernels::WeightFormat::int4 : kernels::WeightFormat::int8;
    args.weight.data = inputs[1];
    args.weight.scales = inputs[2];
    args.weight.rows = s.rows;
    args.weight.cols = s.cols;
    args.weight.group = s.group;
    args.bias = s.bias ? static_cast<const float*>(inputs[3]) : nullptr;
    args.epilogue = as_float ? kernels::Epilogue::store_f32 : kernels::Epilogue::store_bf16;
    const std::int64_t count = num_tokens(in[0].dims);
    if (count >= kFewestPromptTokens) {
      PromptProduct prompt;
      prompt.weight = args.weight;
      prompt.bias = args.bias;
      prompt.x = inputs[0];
      prompt.y = outputs[0];
      prompt.type = half ? Activation::fp16 : Activation::bf16;
      prompt.float_output = s.float_output != 0;
      prompt.num_tokens = count;
      prompt.workspace = workspace;
      prompt.stream = stream;
      if (prompt_product_async(prompt)) return 0;
    }
    for (std::int64_t t = 0; t < count; t += kernels::kMaxGemvTokens) {
      const auto tokens = static_cast<int>(std::min<std::int64_t>(count - t, kernels::kMaxGemvTokens));
      const std::size_t x_at = static_cast<std::size_t>(t) * s.cols, y_at = static_cast<std::size_t>(t) * s.rows;
      args.num_tokens = tokens;
      // fp16 and bf16 are of one size.
      args.x = static_cast<const __nv_bfloat16*>(inputs[0]) + x_at;
      if (half) {
        to_bf16_async(args.x, scratch.x, static_cast<std::size_t>(tokens) * s.cols, stream);
        args.x = scratch.x;
      }
      args.out_bf16 = as_float ? nullptr : static_cast<__nv_bfloat16*>(outputs[0]) + y_at;
      args.out_f32 = s.float_output ? static_cast<float*>(outputs[0]) + y_at : scratch.y;
      kernels::gemv_async(args, stream, false);
      if (half && !s.float_output) {
        to_fp16_async(scratch.y, static_cast<__nv_bfloat16*>(outputs[0]) + y_at,
                      static_cast<std::size_t>(tokens) * s.rows, stream);
      }
    }
    return 0;
  });
}

template class GemmPlugin<4>;
template class GemmPlugin<8>;

}  // namespace edgellm::plugins
