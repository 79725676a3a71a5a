#include "edgellm/weights.hpp"

#include <algorithm>
#include <functional>
#include <span>
#include <stdexcept>
#include <tuple>

#include "edgellm/cuda_try.hpp"
#include "edgellm/kernels/quantized.hpp"

namespace edgellm {
namespace {

using kernels::WeightFormat;
using kernels::WeightView;

void expect(const std::string& name, const HostTensor& host, DType dtype, const Shape& shape) {
  if (host.dtype == dtype && host.shape == shape) return;
  throw std::invalid_argument(name + " is " + name_of(host.dtype) + " " + host.shape.to_string() + "; it must be " +
                              name_of(dtype) + " " + shape.to_string());
}

void copy(void* to, const void* from, std::size_t num_bytes, cudaStream_t stream) {
  EDGELLM_CUDA_TRY(cudaMemcpyAsync(to, from, num_bytes, cudaMemcpyHostToDevice, stream));
}

// Device memory of a view; views are const to the kernels, loading is what writes them.
void* writable(const void* data) { return const_cast<void*>(data); }

}  // namespace

Weights::Weights(const Arena& arena, const DecoderConfig& config) : arena_(arena), config_(config) {
  embedding_ = view("embed", config.vocab_size, config.hidden_size);
  head_ = config.tied_head ? embedding_ : view("head", config.num_rows(), config.hidden_size);
  final_norm_ = arena.get<__nv_bfloat16>("final_norm.weight");
  if (config.head_rows > 0) vocab_map_ = arena.get<std::int32_t>("vocab_map");
  layers_.resize(static_cast<std::size_t>(config.num_layers));
  for (int index = 0; index < config.num_layers; ++index) {
    LayerWeights& layer = layers_[static_cast<std::size_t>(index)];
    const std::string at = "layers." + std::to_string(index) + ".";
    LinearView* const linears[] = {&layer.qkv, &layer.o, &layer.gate_up, &layer.down};
    const std::vector<LinearShape> shapes = layer_linears(config);
    for (std::size_t i = 0; i < shapes.size(); ++i) {
      linears[i]->weight = view(at + shapes[i].stem, shapes[i].rows, shapes[i].cols);
      const std::string stem = at + shapes[i].stem;
      if (config.has_bias(shapes[i].stem)) linears[i]->bias = arena.get<float>(stem + ".bias");
      if (config.ordered.contains(stem)) {
        linears[i]->order = arena.get<std::int32_t>(stem + ".input_order");
        if (follows_norm(stem)) linears[i]->ordered_gain = arena.get<__nv_bfloat16>(stem + ".ordered_gain");
      }
      if (config.factored.contains(stem)) linears[i]->factor = arena.get<float>(stem + ".input_factor");
    }
    layer.input_norm = arena.get<__nv_bfloat16>(at + "input_norm.weight");
    layer.post_norm = arena.get<__nv_bfloat16>(at + "post_norm.weight");
    if (config.output_norms) {
      layer.attn_out_norm = arena.get<__nv_bfloat16>(at + "attn.out_norm.weight");
      layer.mlp_out_norm = arena.get<__nv_bfloat16>(at + "mlp.out_norm.weight");
    }
    layer.rope.cos = arena.get<float>(config.rope(index) + ".cos");
    layer.rope.sin = arena.get<float>(config.rope(index) + ".sin");
    layer.rope.norm_eps = config.rms_norm_eps;
    if (config.qk_norm) {
      layer.rope.q_gain = arena.get<__nv_bfloat16>(at + "attn.q_norm.weight");
      layer.rope.k_gain = arena.get<__nv_bfloat16>(at + "attn.k_norm.weight");
    }
  }
}

WeightView Weights::view(const std::string& stem, int rows, int cols) const {
  WeightView view;
  std::tie(view.format, view.group) = config_.format_of(stem);
  view.data = arena_.get<std::byte>(stem + ".weight");
  if (arena_.plan().contains(stem + ".scale")) view.scales = arena_.get<std::byte>(stem + ".scale");
  view.rows = rows;
  view.cols = cols;
  return view;
}

WeightView& Weights::find(const std::string& stem) {
  if (stem == "embed") return embedding_;
  if (stem == "head" && !config_.tied_head) return head_;
  const std::size_t dot = stem.find('.', 7);
  if (stem.starts_with("layers.") && dot != std::string::npos) {
    const int index = std::stoi(stem.substr(7, dot - 7));
    if (index >= 0 && index < config_.num_layers) {
      LayerWeights& layer = layers_[static_cast<std::size_t>(index)];
      const std::string name = stem.substr(dot + 1);
      if (name == "attn.qkv") return layer.qkv.weight;
      if (name == "attn.o") return layer.o.weight;
      if (name == "mlp.gate_up") return layer.gate_up.weight;
      if (name == "mlp.down") return layer.down.weight;
    }
  }
  throw std::invalid_argument("the decoder has no linear layer " + stem);
}

void Weights::load_linear(const std::string& stem, const HostTensor& weight, const HostTensor* scale,
                          cudaStream_t stream) {
  const WeightView& view = find(stem);
  const std::size_t count = static_cast<std::size_t>(view.rows) * static_cast<std::size_t>(view.cols);
  const Shape shape{view.rows, view.cols};
  const std::size_t num_groups = view.group > 0 ? count / static_cast<std::size_t>(view.group) : 0;
  if (view.group > 0 && scale == nullptr) throw std::invalid_argument(stem + " needs its scales");
  if (view.format == WeightFormat::int8_offset) {
    expect(stem + ".scale", *scale, DType::kFloat16, Shape{view.rows, view.cols / view.group, 2});
  } else if (view.format == WeightFormat::fp8_blocks) {
    expect(stem + ".scale", *scale, DType::kFloat32, Shape{view.rows, view.cols / view.group});
  } else if (view.group > 0) {
    expect(stem + ".scale", *scale, DType::kFloat16, Shape{view.rows, view.cols / view.group});
  }
  switch (view.format) {
    case WeightFormat::bf16:
      if (weight.shape != shape) expect(stem + ".weight", weight, DType::kFloat32, shape);
      load_floats(weight, writable(view.data), count, stream);
      break;
    case WeightFormat::fp8:
      if (weight.shape != shape) expect(stem + ".weight", weight, DType::kFloat32, shape);
      if (scale != nullptr) {  // E4M3 already, with one scale a row
        expect(stem + ".weight", weight, DType::kUInt8, shape);
        expect(stem + ".scale", *scale, DType::kFloat32, Shape{view.rows});
        copy(writable(view.data), weight.data, count, stream);
        copy(writable(view.scales), scale->data, static_cast<std::size_t>(view.rows) * sizeof(float), stream);
      } else {
        load_fp8(view, weight, stream);
      }
      break;
    case WeightFormat::int8:
      expect(stem + ".weight", weight, DType::kInt8, shape);
      copy(writable(view.data), weight.data, count, stream);
      copy(writable(view.scales), scale->data, count / static_cast<std::size_t>(view.group) * 2, stream);
      break;
    case WeightFormat::int8_offset:
    case WeightFormat::fp8_blocks:
      expect(stem + ".weight", weight, view.format == WeightFormat::fp8_blocks ? DType::kUInt8 : DType::kInt8, shape);
      copy(writable(view.data), weight.data, count, stream);
      copy(writable(view.scales), scale->data, num_groups * 4, stream);
      break;
    case WeightFormat::int4: {
      expect(stem + ".weight", weight, DType::kUInt8, Shape{view.rows, view.cols / 2});
      auto* data = arena_.get<std::byte>("scratch");
      const std::size_t aligned =
          (count / 2 + MemoryPlan::kAlignment - 1) / MemoryPlan::kAlignment * MemoryPlan::kAlignment;
      std::byte* scales = data + aligned;
      copy(data, weight.data, count / 2, stream);
      copy(scales, scale->data, count / static_cast<std::size_t>(view.group) * 2, stream);
      kernels::repack_int4_async(reinterpret_cast<const std::uint8_t*>(data), reinterpret_cast<const __half*>(scales),
                                 view.rows, view.cols, view.group, stem.ends_with("mlp.gate_up"), writable(view.data),
                                 writable(view.scales), stream);
      break;
    }
    case WeightFormat::fp16:
      throw std::logic_error("fp16 weights are kept as bf16");
  }
  EDGELLM_CUDA_TRY(cudaStreamSynchronize(stream));
  loaded_.push_back(stem + ".weight");
  if (arena_.plan().contains(stem + ".scale")) loaded_.push_back(stem + ".scale");
}

void Weights::load_vector(const std::string& name, const HostTensor& values, cudaStream_t stream) {
  if (!arena_.plan().contains(name)) throw std::invalid_argument("the decoder has no tensor " + name);
  const bool stays_fp32 = name.ends_with(".bias") || name.ends_with(".input_factor") || name.starts_with("rope");
  const std::size_t count = arena_.plan().size(name) / (stays_fp32 ? sizeof(float) : sizeof(__nv_bfloat16));
  if (values.dtype != DType::kFloat32 || static_cast<std::size_t>(values.shape.num_elements()) != count) {
    throw std::invalid_argument(name + " is " + name_of(values.dtype) + " " + values.shape.to_string() +
                                "; it must be float32 with " + std::to_string(count) + " elements");
  }
  if (stays_fp32) {
    copy(arena_.get<float>(name), values.data, count * sizeof(float), stream);
  } else {
    load_floats(values, arena_.get<__nv_bfloat16>(name), count, stream);
  }
  EDGELLM_CUDA_TRY(cudaStreamSynchronize(stream));
  loaded_.push_back(name);
}

void Weights::load_order(const std::string& stem, const HostTensor& order, cudaStream_t stream) {
  const int cols = find(stem).cols;
  const std::string name = stem + ".input_order";
  if (!arena_.plan().contains(name)) throw std::invalid_argument("the decoder has no tensor " + name);
  expect(name, order, DType::kInt32, Shape{cols});
  const std::span ids(static_cast<const std::int32_t*>(order.data), static_cast<std::size_t>(cols));
  if (std::any_of(ids.begin(), ids.end(), [cols](std::int32_t id) { return id < 0 || id >= cols; })) {
    throw std::invalid_argument(name + " has features beyond 0 to " + std::to_string(cols - 1));
  }
  copy(arena_.get<std::int32_t>(name), ids.data(), ids.size_bytes(), stream);
  EDGELLM_CUDA_TRY(cudaStreamSynchronize(stream));
  loaded_.push_back(name);
}

std::vector<std::string> Weights::input_maps(const std::string& stem) const {
  std::vector<std::string> names = {stem + ".input_order", stem + ".ordered_gain", stem + ".input_factor"};
  std::erase_if(names, [this](const std::string& name) { return !arena_.plan().contains(name); });
  return names;
}

void Weights::load_vocab_map(const HostTensor& token_ids, cudaStream_t stream) {
  if (vocab_map_ == nullptr) throw std::invalid_argument("the decoder's head has a row for every token");
  expect("vocab_map", token_ids, DType::kInt32, Shape{config_.head_rows});
  const std::span ids(static_cast<const std::int32_t*>(token_ids.data), static_cast<std::size_t>(config_.head_rows));
  if (ids.front() < 0 || ids.back() >= config_.vocab_size ||
      std::adjacent_find(ids.begin(), ids.end(), std::greater_equal<>()) != ids.end()) {
    throw std::invalid_argument("vocab_map must ascend, from 0 to " + std::to_string(config_.vocab_size - 1) +
                                " at most");
  }
  copy(arena_.get<std::int32_t>("vocab_map"), ids.data(), ids.size_bytes(), stream);
  EDGELLM_CUDA_TRY(cudaStreamSynchronize(stream));
  loaded_.emplace_back("vocab_map");
}

std::vector<std::string> Weights::missing() const {
  std::vector<std::string> expected = {"embed.weight", "final_norm.weight"};
  for (const std::string& stem : config_.ropes()) expected.insert(expected.end(), {stem + ".cos", stem + ".sin"});
  if (!config_.tied_head) expected.push_back("head.weight");
  if (config_.head_rows > 0) expected.push_back("vocab_map");
  for (int layer = 0; layer < config_.num_layers; ++layer) {
    const std::string at = "layers." + std::to_string(layer) + ".";
    for (const LinearShape& linear : layer_linears(config_)) {
      expected.push_back(at + linear.stem + ".weight");
      if (config_.has_bias(linear.stem)) expected.push_back(at + linear.stem + ".bias");
      for (std::string& name : input_maps(at + linear.stem)) expected.push_back(std::move(name));
    }
    for (const std::string& norm : hidden_norms(config_)) expected.push_back(at + norm + ".weight");
    if (config_.qk_norm) {
      expected.push_back(at + "attn.q_norm.weight");
      expected.push_back(at + "attn.k_norm.weight");
    }
  }
  std::erase_if(expected, [this](const std::string& name) {
    return std::find(loaded_.begin(), loaded_.end(), name) != loaded_.end();
  });
  return expected;
}

// fp32 or fp16 on the host to bf16 on the device, through the scratch in parts.
void Weights::load_floats(const HostTensor& host, void* to, std::size_t count, cudaStream_t stream) {
  auto* target = static_cast<__nv_bfloat16*>(to);
  if (host.dtype == DType::kBFloat16) {
    copy(target, host.data, count * sizeof(__nv_bfloat16), stream);
    return;
  }
  if (host.dtype != DType::kFloat32 && host.dtype != DType::kFloat16) {
    throw std::invalid_argument(std::string("a weight is ") + name_of(host.dtype) + "; it must be float32 or float16");
  }
  const std::size_t element = size_of(host.dtype);
  const std::size_t most = arena_.plan().size("scratch") / element;
  auto* staging = arena_.get<std::byte>("scratch");
  for (std::size_t start = 0; start < count; start += most) {
    const std::size_t part = std::min(most, count - start);
    copy(staging, static_cast<const std::byte*>(host.data) + start * element, part * element, stream);
    if (host.dtype == DType::kFloat32) {
      kernels::convert_to_bf16_async(reinterpret_cast<const float*>(staging), target + start, part, stream);
    } else {
      kernels::convert_to_bf16_async(reinterpret_cast<const __half*>(staging), target + start, part, stream);
    }
  }
}

// Whole rows at a time: a row has one scale.
void Weights::load_fp8(const WeightView& weight, const HostTensor& host, cudaStream_t stream) {
  if (host.dtype != DType::kFloat32 && host.dtype != DType::kFloat16 && host.dtype != DType::kBFloat16) {
    throw std::invalid_argument(std::string("a weight is ") + name_of(host.dtype) + "; fp8 is made from floats");
  }
  const auto cols = static_cast<std::size_t>(weight.cols);
  const std::size_t element = size_of(host.dtype);
  auto* staging = arena_.get<std::byte>("scratch");
  const std::size_t row_bytes = cols * (element + sizeof(__nv_bfloat16));
  const int most = static_cast<int>(std::min((arena_.plan().size("scratch") - MemoryPlan::kAlignment) / row_bytes,
                                             static_cast<std::size_t>(weight.rows)));
  const std::size_t host_part = static_cast<std::size_t>(most) * cols * element;
  auto* wide = reinterpret_cast<__nv_bfloat16*>(staging + (host_part + MemoryPlan::kAlignment - 1) /
                                                              MemoryPlan::kAlignment * MemoryPlan::kAlignment);
  for (int start = 0; start < weight.rows; start += most) {
    const int rows = std::min(most, weight.rows - start);
    const std::size_t first = static_cast<std::size_t>(start) * cols;
    const std::size_t count = static_cast<std::size_t>(rows) * cols;
    const auto* from = static_cast<const std::byte*>(host.data) + first * element;
    copy(host.dtype == DType::kBFloat16 ? static_cast<void*>(wide) : staging, from, count * element, stream);
    if (host.dtype == DType::kFloat32) {
      kernels::convert_to_bf16_async(reinterpret_cast<const float*>(staging), wide, count, stream);
    } else if (host.dtype == DType::kFloat16) {
      kernels::convert_to_bf16_async(reinterpret_cast<const __half*>(staging), wide, count, stream);
    }
    kernels::quantize_fp8_async(wide, rows, weight.cols, static_cast<std::uint8_t*>(writable(weight.data)) + first,
                                static_cast<float*>(writable(weight.scales)) + start, stream, false);
  }
}

}  // namespace edgellm
