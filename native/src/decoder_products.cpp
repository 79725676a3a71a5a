// Prefill's matrix products: with weights in bf16 or copied to it, with int4 weights as they are stored, or in FP8 with
// activations rounded to it.
#include <algorithm>
#include <set>
#include <string>

#include "device_attribute.hpp"
#include "edgellm/cuda_try.hpp"
#include "edgellm/decoder.hpp"
#include "edgellm/kernels/gemm_int4.hpp"
#include "edgellm/kernels/input_map.hpp"
#include "edgellm/kernels/quantized.hpp"
#include "edgellm/kernels/rms_norm.hpp"
#include "edgellm/kernels/swiglu.hpp"

namespace edgellm {
namespace {

using kernels::WeightFormat;

constexpr std::size_t kEvictedBytes = std::size_t{128} << 20;  // written to empty the L2 cache, which is smaller

bool device_has_fp8() {
  return 10 * device_attribute(cudaDevAttrComputeCapabilityMajor) +
             device_attribute(cudaDevAttrComputeCapabilityMinor) >=
         89;
}

}  // namespace

// No weight is loaded yet, nor is the cache in use: all of that is memory to try algorithms on.
void Decoder::prepare_products() {
  if (config_.max_packed_tokens > 0) {
    for (int index = 0; index < config_.num_layers; ++index) {
      for (const LinearView* linear : weights_.layer(index).linears()) {
        if (linear->weight.format == WeightFormat::int4) kernels::load_gemm_int4(linear->weight.group);
      }
    }
  }
  if (!config_.needs_cublaslt()) return;
  products_reason_ = MatrixProducts::unavailable_reason();
  if (!products_reason_.empty()) return;
  products_ =
      std::make_unique<MatrixProducts>(arena_.get<std::byte>("cublaslt"), config_.max_tokens, config_.row_invariant);
  // Layers have the same shapes, but may differ in format: one weight of each kind is tried.
  struct Product {
    LinearView LayerWeights::* linear;
    const char* x;
    const char* y;
  };
  constexpr Product kProducts[] = {{&LayerWeights::qkv, "normed", "qkv"},
                                   {&LayerWeights::o, "attended", "delta"},
                                   {&LayerWeights::gate_up, "normed", "gate_up"},
                                   {&LayerWeights::down, "activated", "delta"}};
  const auto prepare = [&](const Product& product, ProductType type, const kernels::WeightView& weight, int rows) {
    ProductTrial trial;
    trial.weight = static_cast<std::byte*>(const_cast<void*>(weight.data));
    trial.x = arena_.get<std::byte>(type == ProductType::fp8 ? "x_fp8" : product.x);
    trial.y = arena_.get<std::byte>(product.y);
    if (type == ProductType::bf16 && weight.format != WeightFormat::bf16) {
      trial.weight = arena_.get<std::byte>("scratch");  // where its copy is made just before
    } else {
      trial.evictions = {arena_.get<std::byte>("kv"), std::min(arena_.plan().size("kv"), kEvictedBytes)};
    }
    return products_->prepare(type, rows, weight.cols, trial, stream_.get());
  };
  const auto prepare_bf16 = [&](const Product& product, const kernels::WeightView& weight) {
    const int most = weight.format == WeightFormat::bf16 ? weight.rows
                                                         : config_.copied_rows(weight.format, weight.rows, weight.cols);
    for (const int rows : {most, weight.rows % most}) {
      if (rows == 0 || prepare(product, ProductType::bf16, weight, rows)) continue;
      throw CudaError(cudaErrorNotSupported, "cuBLASLt has no algorithm for a weight of " + std::to_string(rows) +
                                                 " x " + std::to_string(weight.cols));
    }
  };
  bool all_fp8 = true;
  for (const Product& product : kProducts) {
    std::set<WeightFormat> prepared;
    for (int index = 0; index < config_.num_layers; ++index) {
      const kernels::WeightView& weight = (weights_.layer(index).*product.linear).weight;
      const bool multiplied = weight.format == WeightFormat::bf16 || config_.copies(weight.format);
      if (multiplied && prepared.insert(weight.format).second) prepare_bf16(product, weight);
    }
  }
  fp8_products_ = config_.has_fp8_layers() && config_.fp8_prefill && device_has_fp8() &&
                  config_.intermediate_size <= kernels::kMaxFp8Width;
  if (!fp8_products_) return;
  for (const Product& product : kProducts) {
    for (int index = 0; index < config_.num_layers && all_fp8; ++index) {
      const kernels::WeightView& weight = (weights_.layer(index).*product.linear).weight;
      if (weight.format != WeightFormat::fp8) continue;
      all_fp8 = prepare(product, ProductType::fp8, weight, weight.rows);
    }
  }
  fp8_products_ = all_fp8;
}

const __nv_bfloat16* Decoder::map_input_async(const LinearView& linear, const __nv_bfloat16* x, int num_tokens,
                                              bool pdl) {
  if (!linear.maps_input()) return x;
  kernels::InputMapArgs args;
  args.x = x;
  args.order = linear.order;
  args.factor = linear.factor;
  args.out = arena_.get<__nv_bfloat16>("mapped_x");
  args.num_tokens = num_tokens;
  args.cols = linear.weight.cols;
  kernels::map_input_async(args, stream_.get(), pdl);
  return args.out;
}

// A norm commutes with the order of its features, and its gain has been put in order at load.
bool Decoder::map_args_async(const LinearView& linear, kernels::GemvArgs& args, bool pdl) {
  if (!linear.maps_input()) return pdl;
  args.x = map_input_async(linear, args.x, args.num_tokens, pdl);
  args.x_f32 = nullptr;  // in another order
  if (args.gain != nullptr && linear.ordered_gain != nullptr) args.gain = linear.ordered_gain;
  return pdl_;
}

bool Decoder::multiplies_fp8(const LinearView& linear, bool products, int adapter) const {
  return products && fp8_products_ && adapter == 0 && linear.weight.format == WeightFormat::fp8 && !linear.maps_input();
}

// y = x W^T. An int4 weight is multiplied as it is, or as every other format: copied to bf16, as a whole or in parts.
// Parts go to two streams in turn: one is copied, or multiplied by few blocks, beside the product of the other.
bool Decoder::product_async(const LinearView& linear, bool gate_up, const __nv_bfloat16* x, __nv_bfloat16* y,
                            int count) {
  const kernels::WeightView& weight = linear.weight;
  cudaStream_t stream = stream_.get();
  if (weight.format == WeightFormat::bf16) {
    products_->run_async(ProductType::bf16, x, weight.data, y, count, weight.rows, weight.cols, weight.rows, stream);
    return pdl_;
  }
  if (weight.format == WeightFormat::int4 && count <= config_.max_packed_tokens) {
    kernels::GemmInt4Args args;
    args.weight = weight;
    args.gate_up = gate_up;
    args.x = x;
    args.y = y;
    args.num_tokens = count;
    args.row_invariant = config_.row_invariant;
    kernels::gemm_int4_async(args, stream, pdl_);
    return pdl_;
  }
  const int part = config_.copied_rows(weight.format, weight.rows, weight.cols);
  const bool forks = part < weight.rows && arena_.plan().contains("side_scratch");
  auto* wide = arena_.get<__nv_bfloat16>("scratch");
  auto* side_wide = forks ? arena_.get<__nv_bfloat16>("side_scratch") : nullptr;
  auto* side_workspace = forks ? arena_.get<std::byte>("side_cublaslt") : nullptr;
  if (forks) {
    fork_.record(stream);
    EDGELLM_CUDA_TRY(cudaStreamWaitEvent(side_stream_.get(), fork_.get(), 0));
  }
  bool side = false;
  for (int first = 0; first < weight.rows; first += part) {
    const int rows = std::min(part, weight.rows - first);
    cudaStream_t own_stream = side ? side_stream_.get() : stream;
    __nv_bfloat16* own_wide = side ? side_wide : wide;
    // A stream's first part follows an event.
    kernels::dequantize_async(weight, gate_up, first, rows, own_wide, own_stream, pdl_ && !forks);
    products_->run_async(ProductType::bf16, x, own_wide, y + first, count, rows, weight.cols, weight.rows, own_stream,
                         side ? side_workspace : nullptr);
    side = forks && !side;
  }
  if (forks) {
    join_.record(side_stream_.get());
    EDGELLM_CUDA_TRY(cudaStreamWaitEvent(stream, join_.get(), 0));
  }
  return pdl_ && !forks;
}

// A product in FP8 has x_fp8 with x_scales as its input, and its output lacks the scales, which its reader applies.
// With an adapter a prompt goes through bf16: what is added must not need the scales, nor x its rounding.
bool Decoder::prompt_product_async(int index, Linear which, const __nv_bfloat16* x, __nv_bfloat16* y, int count,
                                   int adapter) {
  const LinearView& linear = *weights_.layer(index).linears()[static_cast<std::size_t>(which)];
  if (multiplies_fp8(linear, true, adapter)) {
    fp8_product_async(linear, y, count);
    return pdl_;
  }
  x = map_input_async(linear, x, count, false);
  const bool next = product_async(linear, which == Linear::kGateUp, x, y, count);
  return adapt_product_async(adapter, index, which, x, y, count, next);
}

kernels::ProductScales Decoder::product_scales(const LinearView& linear, bool products, int adapter) const {
  if (!multiplies_fp8(linear, products, adapter)) return {};
  return {arena_.get<float>("x_scales"), static_cast<const float*>(linear.weight.scales)};
}

// Most nodes of a draft that every layer multiplies without a copy of its weights, and in bf16.
int Decoder::count_multiplied_nodes() const {
  if (config_.min_gemm_tokens > config_.max_tokens) return 0;  // no prompt has products
  int most = std::min(config_.max_tokens, kMaxVerifyTokens);
  for (int index = 0; index < config_.num_layers; ++index) {
    for (const LinearView* linear : weights_.layer(index).linears()) {
      const WeightFormat format = linear->weight.format;
      if (format == WeightFormat::int4) {
        most = std::min(most, config_.max_packed_tokens);
      } else if (format != WeightFormat::bf16 || products_ == nullptr) {
        return 0;
      }
    }
  }
  return most;
}

void Decoder::prepare_head_product() {
  const int most_rows = std::min(verify_class(config_.max_verify_tokens), most_multiplied_nodes_);
  if (most_rows <= kMaxBatch) return;
  const kernels::WeightView& head = weights_.head();
  if (head.format == WeightFormat::int4 && !config_.row_invariant) kernels::load_gemm_int4(head.group);
  if (head.format != WeightFormat::bf16 || products_ == nullptr) return;
  head_products_ =
      std::make_unique<MatrixProducts>(arena_.get<std::byte>("cublaslt"), most_rows, config_.row_invariant);
  ProductTrial trial;
  trial.weight = static_cast<std::byte*>(const_cast<void*>(head.data));
  trial.x = arena_.get<std::byte>("normed");
  trial.y = arena_.get<std::byte>("logits");
  trial.evictions = {arena_.get<std::byte>("kv"), std::min(arena_.plan().size("kv"), kEvictedBytes)};
  const ProductType type = ProductType::bf16_to_fp32;
  if (!head_products_->prepare(type, head.rows, head.cols, trial, stream_.get())) head_products_.reset();
}

// Logits must not be rounded to bf16; of int4 products only those of few tokens can do without.
bool Decoder::multiplies_head(int num_rows) const {
  const kernels::WeightView& head = weights_.head();
  if (head.format != WeightFormat::int4) return head_products_ != nullptr;
  return !config_.row_invariant && kernels::has_gemm_int4_split(num_rows, head.group);
}

void Decoder::head_product_async(int num_rows) {
  const kernels::WeightView& head = weights_.head();
  auto* normed = arena_.get<__nv_bfloat16>("normed");
  auto* logits = arena_.get<float>("logits");
  kernels::rms_norm_async(arena_.get<float>("residual"), weights_.final_norm(), config_.rms_norm_eps, num_rows,
                          config_.hidden_size, normed, stream_.get(), pdl_);
  if (head.format == WeightFormat::int4) {
    kernels::GemmInt4Args args;
    args.weight = head;
    args.x = normed;
    args.y_f32 = logits;
    args.num_tokens = num_rows;
    kernels::gemm_int4_async(args, stream_.get(), pdl_);
  } else {
    head_products_->run_async(ProductType::bf16_to_fp32, normed, head.data, logits, num_rows, head.rows, head.cols,
                              head.rows, stream_.get());
  }
  cap_logits_async(num_rows);
}

void Decoder::quantize_x_async(const __nv_bfloat16* x, int count, int width) {
  kernels::quantize_fp8_async(x, count, width, arena_.get<std::uint8_t>("x_fp8"), arena_.get<float>("x_scales"),
                              stream_.get(), pdl_);
}

// y = x_fp8 W^T without either's scales.
void Decoder::fp8_product_async(const LinearView& linear, __nv_bfloat16* y, int count) {
  const kernels::WeightView& weight = linear.weight;
  products_->run_async(ProductType::fp8, arena_.get<std::uint8_t>("x_fp8"), weight.data, y, count, weight.rows,
                       weight.cols, weight.rows, stream_.get());
}

}  // namespace edgellm
