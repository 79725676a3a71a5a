#include "edgellm/adapters.hpp"

#include <algorithm>
#include <array>
#include <iterator>
#include <stdexcept>

#include "edgellm/cuda_try.hpp"
#include "edgellm/kernels/gemv.hpp"
#include "edgellm/verify_inputs.hpp"

namespace edgellm {
namespace {

using kernels::LoraLinear;

constexpr unsigned kLoaded = 1U << kNumLinears;

struct Target {
  const char* name;
  Linear linear;
  int place;  // among the linear layer's targets
};
constexpr Target kTargets[] = {
    {"q_proj", Linear::kQkv, 0},     {"k_proj", Linear::kQkv, 1},       {"v_proj", Linear::kQkv, 2},
    {"o_proj", Linear::kO, 0},       {"gate_proj", Linear::kGateUp, 0}, {"up_proj", Linear::kGateUp, 1},
    {"down_proj", Linear::kDown, 0},
};

std::vector<int> rows_of(const DecoderConfig& config, Linear linear) {
  const int kv = config.num_kv_heads * config.head_dim;
  switch (linear) {
    case Linear::kQkv:
      return {0, config.q_width(), config.q_width() + kv, config.qkv_width()};
    case Linear::kGateUp:
      return {0, config.intermediate_size, 2 * config.intermediate_size};
    default:
      return {0, config.hidden_size};
  }
}

int num_targets(const DecoderConfig& config, Linear linear) {
  return static_cast<int>(rows_of(config, linear).size()) - 1;
}

LinearShape shape_of(const DecoderConfig& config, int linear) {
  return layer_linears(config)[static_cast<std::size_t>(linear)];
}

// Bytes that a linear layer of one adapter may take: A, then B.
std::size_t a_bytes(const DecoderConfig& config, int linear) {
  const int rows = num_targets(config, static_cast<Linear>(linear)) * kernels::padded_lora_rank(config.max_lora_rank);
  return static_cast<std::size_t>(rows) * static_cast<std::size_t>(shape_of(config, linear).cols) * 2;
}
std::size_t b_bytes(const DecoderConfig& config, int linear) {
  return static_cast<std::size_t>(shape_of(config, linear).rows) *
         static_cast<std::size_t>(kernels::padded_lora_rank(config.max_lora_rank)) * 2;
}
std::size_t layer_bytes(const DecoderConfig& config) {
  std::size_t bytes = 0;
  for (int linear = 0; linear < kNumLinears; ++linear) bytes += a_bytes(config, linear) + b_bytes(config, linear);
  return bytes;
}

// The widest h of a token: three targets of the largest rank.
int h_width(const DecoderConfig& config) {
  return kernels::kMaxLoraTargets * kernels::padded_lora_rank(config.max_lora_rank);
}

float value_at(const HostTensor& host, std::size_t index) {
  switch (host.dtype) {
    case DType::kFloat32:
      return static_cast<const float*>(host.data)[index];
    case DType::kFloat16:
      return __half2float(static_cast<const __half*>(host.data)[index]);
    default:
      return __bfloat162float(static_cast<const __nv_bfloat16*>(host.data)[index]);
  }
}

[[noreturn]] void refuse(const std::string& message) { throw std::invalid_argument(message); }

std::string name_of(const AdapterTensors& item) { return "layers." + std::to_string(item.layer) + "." + item.target; }

void check_float(const std::string& name, const HostTensor& host) {
  if (host.dtype != DType::kFloat32 && host.dtype != DType::kFloat16 && host.dtype != DType::kBFloat16) {
    refuse(name + " is " + name_of(host.dtype) + "; it must be float32, float16 or bfloat16");
  }
}

const Target& target_of(const AdapterTensors& item) {
  for (const Target& target : kTargets) {
    if (item.target == target.name) return target;
  }
  refuse("the adapter changes " + item.target + "; adapters may change q_proj, k_proj, v_proj, o_proj, gate_proj, " +
         "up_proj and down_proj");
}

// Everything about one target that can be wrong. Returns its rank.
int checked_rank(const AdapterTensors& item, const Target& target, const DecoderConfig& config) {
  const std::string name = name_of(item);
  if (item.layer < 0 || item.layer >= config.num_layers) {
    refuse(name + ": the model has layers 0 to " + std::to_string(config.num_layers - 1) +
           "; the adapter was made for another model");
  }
  check_float(name + ".lora_A", item.a);
  check_float(name + ".lora_B", item.b);
  const std::vector<int> rows = rows_of(config, target.linear);
  const auto place = static_cast<std::size_t>(target.place);
  const std::int64_t out = rows[place + 1] - rows[place];
  const std::int64_t in = shape_of(config, static_cast<int>(target.linear)).cols;
  const std::string other = "; the adapter was made for another model";
  if (item.a.shape.rank() != 2 || item.a.shape[1] != in) {
    refuse(name + ".lora_A is " + item.a.shape.to_string() + "; it must be [rank, " + std::to_string(in) + "]" + other);
  }
  const std::int64_t rank = item.a.shape[0];
  if (item.b.shape.rank() != 2 || item.b.shape[0] != out || item.b.shape[1] != rank) {
    refuse(name + ".lora_B is " + item.b.shape.to_string() + "; it must be [" + std::to_string(out) + ", " +
           std::to_string(rank) + "]" + other);
  }
  if (rank > config.max_lora_rank) {
    refuse(name + " has rank " + std::to_string(rank) + "; max_lora_rank is " + std::to_string(config.max_lora_rank) +
           ", and at most " + std::to_string(kernels::kMaxLoraRank) + " is possible");
  }
  return static_cast<int>(rank);
}

using Parts = std::array<const AdapterTensors*, kernels::kMaxLoraTargets>;  // of one linear layer, null: not adapted

// A and B as the kernels read them, with zeros where a rank is padded.
struct HostPart {
  std::vector<__nv_bfloat16> a;
  std::vector<__nv_bfloat16> b;
  LoraLinear linear;  // without pointers
};

HostPart make_part(const Parts& parts, const DecoderConfig& config, Linear linear) {
  HostPart part;
  const std::vector<int> rows = rows_of(config, linear);
  const auto cols = static_cast<std::size_t>(shape_of(config, static_cast<int>(linear)).cols);
  for (std::size_t i = 0; i + 1 < rows.size(); ++i) {
    if (i > 0) {
      part.linear.first_row[i - 1] = rows[i];
      part.linear.first_b[i - 1] = static_cast<std::int32_t>(part.b.size());
    }
    const AdapterTensors* item = parts[i];
    if (item == nullptr) continue;
    const auto rank = static_cast<std::size_t>(item->a.shape[0]);
    const auto padded = static_cast<std::size_t>(kernels::padded_lora_rank(static_cast<int>(rank)));
    const auto out = static_cast<std::size_t>(rows[i + 1] - rows[i]);
    part.linear.rank[i] = static_cast<std::uint8_t>(padded);
    part.linear.first_h[i] = static_cast<std::uint8_t>(part.linear.num_a_rows);
    part.linear.num_a_rows += static_cast<std::int32_t>(padded);
    const __nv_bfloat16 zero = __float2bfloat16(0.0F);
    for (std::size_t j = 0; j < rank * cols; ++j) part.a.push_back(__float2bfloat16(value_at(item->a, j)));
    part.a.resize(part.a.size() + (padded - rank) * cols, zero);
    for (std::size_t row = 0; row < out; ++row) {
      for (std::size_t r = 0; r < padded; ++r) {
        part.b.push_back(r < rank ? __float2bfloat16(item->scale * value_at(item->b, row * rank + r)) : zero);
      }
    }
  }
  part.linear.num_b = static_cast<std::int32_t>(part.b.size());
  return part;
}

}  // namespace

void plan_adapters(MemoryPlan& plan, const DecoderConfig& config) {
  if (config.max_adapters == 0) return;
  const auto adapters = static_cast<std::size_t>(config.max_adapters);
  const auto layers = static_cast<std::size_t>(config.num_layers);
  const auto width = static_cast<std::size_t>(h_width(config));
  plan.add("adapters", "lora.pool", adapters * layers * layer_bytes(config));
  plan.add("adapters", "lora.table", adapters * layers * kNumLinears * sizeof(LoraLinear));
  plan.add("adapters", "lora.h", std::size_t{kernels::kMaxGemvTokens} * width * sizeof(float));
  plan.add("adapters", "lora.prefill_h", static_cast<std::size_t>(config.max_tokens) * width * 2);
  plan.add("adapters", "lora.decode_adapters", std::size_t{kMaxVerifyTokens} * sizeof(std::int32_t));
  plan.add("adapters", "lora.prefill_adapters", std::size_t{kernels::kMaxGemvTokens} * sizeof(std::int32_t));
}

Adapters::Adapters(const Arena& arena, const DecoderConfig& config) : arena_(arena), config_(config) {
  table_.resize(static_cast<std::size_t>(config.max_adapters * config.num_layers * kNumLinears));
  loaded_.resize(static_cast<std::size_t>(config.max_adapters));
}

void Adapters::load(int index, std::span<const AdapterTensors> tensors, cudaStream_t stream) {
  if (index < 1 || index > config_.max_adapters) {
    refuse("adapter " + std::to_string(index) + " has no place; there are 1 to " +
           std::to_string(config_.max_adapters) + " (max_adapters)");
  }
  std::vector<Parts> parts(static_cast<std::size_t>(config_.num_layers * kNumLinears), Parts{});
  for (const AdapterTensors& item : tensors) {
    const Target& target = target_of(item);
    (void)checked_rank(item, target, config_);
    const auto at = static_cast<std::size_t>(item.layer * kNumLinears + static_cast<int>(target.linear));
    const AdapterTensors*& part = parts[at][static_cast<std::size_t>(target.place)];
    if (part != nullptr) refuse(name_of(item) + " is given twice");
    part = &item;
  }

  unload(index, stream);
  unsigned bits = kLoaded;
  for (int layer = 0; layer < config_.num_layers; ++layer) {
    for (int l = 0; l < kNumLinears; ++l) {
      const auto linear = static_cast<Linear>(l);
      HostPart part = make_part(parts[static_cast<std::size_t>(layer * kNumLinears + l)], config_, linear);
      if (part.linear.num_a_rows == 0) continue;
      std::byte* a = place(index, layer, linear);
      std::byte* b = a + a_bytes(config_, l);
      part.linear.a = reinterpret_cast<const __nv_bfloat16*>(a);
      part.linear.b = reinterpret_cast<const __nv_bfloat16*>(b);
      EDGELLM_CUDA_TRY(cudaMemcpyAsync(a, part.a.data(), part.a.size() * 2, cudaMemcpyHostToDevice, stream));
      EDGELLM_CUDA_TRY(cudaMemcpyAsync(b, part.b.data(), part.b.size() * 2, cudaMemcpyHostToDevice, stream));
      EDGELLM_CUDA_TRY(cudaStreamSynchronize(stream));  // `part` goes
      table_[slot_of(index, layer, linear)] = part.linear;
      bits |= linear_bit(linear);
    }
  }
  loaded_[static_cast<std::size_t>(index - 1)] = bits;
  linears_ |= bits & ~kLoaded;
  upload_table(stream);
}

void Adapters::unload(int index, cudaStream_t stream) {
  if (index < 1 || index > config_.max_adapters) refuse("adapter " + std::to_string(index) + " has no place");
  for (int layer = 0; layer < config_.num_layers; ++layer) {
    for (int l = 0; l < kNumLinears; ++l) table_[slot_of(index, layer, static_cast<Linear>(l))] = LoraLinear{};
  }
  loaded_[static_cast<std::size_t>(index - 1)] = 0;
  linears_ = 0;
  for (const unsigned bits : loaded_) linears_ |= bits & ~kLoaded;
  upload_table(stream);
}

void Adapters::check(int index) const {
  if (index == 0) return;
  if (index < 0 || index > config_.max_adapters || loaded_[static_cast<std::size_t>(index - 1)] == 0) {
    refuse("a step names adapter " + std::to_string(index) + ", which is not loaded");
  }
}

kernels::LoraView Adapters::view(int layer, Linear linear, const std::int32_t* adapters) const {
  kernels::LoraView view;
  view.linears = arena_.get<const LoraLinear>("lora.table") + slot_of(1, layer, linear);
  view.adapters = adapters;
  view.h = arena_.get<float>("lora.h");
  view.h_stride = num_targets(config_, linear) * kernels::padded_lora_rank(config_.max_lora_rank);
  return view;
}

const LoraLinear& Adapters::part(int index, int layer, Linear linear) const {
  return table_[slot_of(index, layer, linear)];
}

std::vector<int> Adapters::target_rows(Linear linear) const { return rows_of(config_, linear); }

std::size_t Adapters::slot_of(int index, int layer, Linear linear) const {
  return static_cast<std::size_t>((layer * kNumLinears + static_cast<int>(linear)) * config_.max_adapters + index - 1);
}

std::byte* Adapters::place(int index, int layer, Linear linear) const {
  std::size_t offset = static_cast<std::size_t>((index - 1) * config_.num_layers + layer) * layer_bytes(config_);
  for (int l = 0; l < static_cast<int>(linear); ++l) offset += a_bytes(config_, l) + b_bytes(config_, l);
  return arena_.get<std::byte>("lora.pool") + offset;
}

void Adapters::upload_table(cudaStream_t stream) {
  EDGELLM_CUDA_TRY(cudaMemcpyAsync(arena_.get<std::byte>("lora.table"), table_.data(),
                                   table_.size() * sizeof(LoraLinear), cudaMemcpyHostToDevice, stream));
  EDGELLM_CUDA_TRY(cudaStreamSynchronize(stream));
}

}  // namespace edgellm
