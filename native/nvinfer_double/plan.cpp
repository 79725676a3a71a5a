#include "plan.hpp"

#include <algorithm>
#include <cstring>
#include <stdexcept>

#include "json.hpp"

namespace edgellm::nvinfer_double {
namespace {

using nvinfer1::DataType;

const std::map<std::string, DataType, std::less<>> kDataTypes = {
    {"float32", DataType::kFLOAT}, {"float16", DataType::kHALF}, {"bfloat16", DataType::kBF16},
    {"int64", DataType::kINT64},   {"int32", DataType::kINT32},  {"int8", DataType::kINT8}};
const std::map<std::string, kernels::WeightFormat, std::less<>> kWeightFormats = {
    {"bf16", kernels::WeightFormat::bf16},
    {"fp8", kernels::WeightFormat::fp8},
    {"int8", kernels::WeightFormat::int8},
    {"int4", kernels::WeightFormat::int4},
    {"int8_offset", kernels::WeightFormat::int8_offset},
    {"fp8_blocks", kernels::WeightFormat::fp8_blocks}};
const std::map<std::string, kernels::KvFormat, std::less<>> kKvFormats = {
    {"bf16", kernels::KvFormat::bf16}, {"fp16", kernels::KvFormat::fp16}, {"fp8", kernels::KvFormat::fp8}};
const std::map<std::string, kernels::Activation, std::less<>> kActivations = {
    {"silu", kernels::Activation::silu}, {"gelu_tanh", kernels::Activation::gelu_tanh}};

template <class Map>
auto choose(const Map& map, const std::string& name) {
  const auto found = map.find(name);
  if (found == map.end()) throw std::invalid_argument("the plan names '" + name + "', which the double does not have");
  return found->second;
}

Binding read_binding(const Json& json) {
  Binding binding;
  binding.name = json.at("name").text();
  binding.is_input = json.at("is_input").flag();
  binding.dtype = choose(kDataTypes, json.at("dtype").text());
  binding.shape = json.at("shape").integers();
  binding.role = json.at("role").text();
  binding.layer = static_cast<int>(json.at("layer").integer());
  binding.stem = json.at("stem").text();
  binding.window = static_cast<int>(json.at("window").integer());
  if (binding.shape.size() > static_cast<std::size_t>(nvinfer1::Dims::MAX_DIMS)) {
    throw std::invalid_argument(binding.name + " has " + std::to_string(binding.shape.size()) + " axes");
  }
  return binding;
}

Profile read_profile(const Json& json, const Plan& plan) {
  Profile profile;
  for (const auto& [name, range] : json.object()) {
    const Binding* binding = plan.find(name);
    const ShapeRange read{range.at("min").integers(), range.at("opt").integers(), range.at("max").integers()};
    for (const Sizes* sizes : {&read.smallest, &read.best, &read.largest}) {
      if (binding == nullptr || !binding->is_input || sizes->size() != binding->shape.size()) {
        throw std::invalid_argument("a profile has a range of " + name + ", which is no input of that shape");
      }
    }
    profile.emplace(name, read);
  }
  for (const Binding& binding : plan.bindings) {
    if (binding.is_input && !profile.contains(binding.name)) {
      throw std::invalid_argument("a profile has no range of the input " + binding.name);
    }
  }
  return profile;
}

DecoderConfig read_decoder(const Json& json) {
  DecoderConfig config;
  const std::pair<const char*, int*> numbers[] = {
      {"num_layers", &config.num_layers},       {"hidden_size", &config.hidden_size},
      {"num_heads", &config.num_heads},         {"intermediate_size", &config.intermediate_size},
      {"head_dim", &config.head_dim},           {"num_kv_heads", &config.num_kv_heads},
      {"vocab_size", &config.vocab_size},       {"head_rows", &config.head_rows},
      {"num_positions", &config.num_positions}, {"capacity", &config.capacity},
  };
  for (const auto& [name, target] : numbers) *target = static_cast<int>(json.at(name).integer());
  config.rms_norm_eps = static_cast<float>(json.at("rms_norm_eps").number());
  config.attention_scale = static_cast<float>(json.at("attention_scale").number());
  config.logit_softcap = static_cast<float>(json.at("logit_softcap").number());
  config.activation = choose(kActivations, json.at("activation").text());
  config.output_norms = json.at("output_norms").flag();
  config.qk_norm = json.at("qk_norm").flag();
  config.tied_head = json.at("tied_head").flag();
  config.batch_invariant = json.at("batch_invariant").flag();
  for (const std::int64_t window : json.at("sliding_windows").integers()) {
    config.sliding_windows.push_back(static_cast<int>(window));
  }
  for (const Json& stem : json.at("layer_ropes").array()) config.layer_ropes.push_back(stem.text());
  for (const Json& stem : json.at("biases").array()) config.biases.push_back(stem.text());
  for (const auto& [stem, form] : json.at("formats").object()) {
    config.formats[stem] = {choose(kWeightFormats, form.at("format").text()),
                            static_cast<int>(form.at("group").integer())};
  }
  config.kv_format = choose(kKvFormats, json.at("kv_format").text());
  config.max_tokens = 64;
  config.check();
  return config;
}

StoredWeight read_weight(const Json& json, std::span<const std::byte> data) {
  StoredWeight weight;
  weight.name = json.at("name").text();
  weight.dtype = dtype_from_name(json.at("dtype").text());
  weight.shape = Shape(json.at("shape").integers());
  const auto offset = static_cast<std::size_t>(json.at("offset").integer());
  const std::size_t length = static_cast<std::size_t>(weight.shape.num_elements()) * edgellm::size_of(weight.dtype);
  if (offset > data.size() || length > data.size() - offset) {
    throw std::invalid_argument("the plan is truncated: " + weight.name + " ends behind it");
  }
  weight.bytes = data.subspan(offset, length);
  return weight;
}

Faults read_faults(const Json& json) {
  Faults faults;
  for (const auto& [name, value] : json.object()) {
    if (name == "deserialize") {
      faults.deserialize = value.text();
    } else if (name == "create_context") {
      faults.create_context = value.text();
    } else if (name == "enqueue") {
      faults.enqueue = value.integer();
    } else if (name == "execution_trap") {
      faults.execution_trap = value.integer();
    } else if (name == "execution_nan") {
      faults.execution_nan = value.integer();
    } else {
      throw std::invalid_argument("the double has no fault '" + name +
                                  "'; it has deserialize, create_context, enqueue, execution_trap and execution_nan");
    }
  }
  return faults;
}

}  // namespace

const Binding* Plan::find(std::string_view name) const {
  const auto found = std::find_if(bindings.begin(), bindings.end(), [&](const Binding& b) { return b.name == name; });
  return found == bindings.end() ? nullptr : &*found;
}

Plan parse_plan(std::span<const std::byte> blob) {
  const std::string_view all(reinterpret_cast<const char*>(blob.data()), blob.size());
  std::uint64_t length = 0;
  const std::size_t start = kMagic.size() + sizeof(length);
  if (!all.starts_with(kMagic)) {
    throw std::invalid_argument("this is no plan of the double (an engine for TensorRT cannot run here)");
  }
  if (all.size() < start) throw std::invalid_argument("the plan is truncated: it has no JSON");
  std::memcpy(&length, all.data() + kMagic.size(), sizeof(length));
  if (length > all.size() - start) throw std::invalid_argument("the plan is truncated: its JSON ends behind it");
  const Json json = Json::parse(all.substr(start, length));
  const std::size_t end = (start + length + kWeightAlignment - 1) / kWeightAlignment * kWeightAlignment;
  const std::span<const std::byte> data = blob.subspan(std::min(end, blob.size()));

  Plan plan;
  plan.tensorrt = json.at("tensorrt").integers();
  if (plan.tensorrt.size() != 3) throw std::invalid_argument("'tensorrt' is not major, minor and patch");
  for (const Json& binding : json.at("bindings").array()) plan.bindings.push_back(read_binding(binding));
  for (const Json& profile : json.at("profiles").array()) plan.profiles.push_back(read_profile(profile, plan));
  if (plan.profiles.empty()) throw std::invalid_argument("the plan has no profile");
  plan.decoder = read_decoder(json.at("decoder"));
  plan.is_bf16 = json.at("decoder").at("is_bf16").flag();
  for (const Json& weight : json.at("weights").array()) plan.weights.push_back(read_weight(weight, data));
  if (json.has("faults")) plan.faults = read_faults(json.at("faults"));
  return plan;
}

std::size_t size_of(DataType dtype) {
  switch (dtype) {
    case DataType::kINT64:
      return 8;
    case DataType::kHALF:
    case DataType::kBF16:
      return 2;
    case DataType::kINT8:
      return 1;
    default:
      return 4;
  }
}

std::string to_string(const Sizes& sizes) {
  std::string text = "[";
  for (std::size_t i = 0; i < sizes.size(); ++i) {
    if (i > 0) text += ", ";
    text += std::to_string(sizes[i]);
  }
  text += ']';
  return text;
}

}  // namespace edgellm::nvinfer_double
