#include "context.hpp"

#include <algorithm>
#include <cstdint>
#include <iterator>
#include <stdexcept>
#include <utility>

#include "edgellm/cuda_try.hpp"

namespace edgellm::nvinfer_double {

using nvinfer1::Dims;
using nvinfer1::ExecutionContextAllocationStrategy;

namespace {

[[noreturn]] void refuse(const std::string& message) { throw std::invalid_argument(message); }

bool is_known(const Sizes& sizes) { return std::find(sizes.begin(), sizes.end(), -1) == sizes.end(); }

bool is_aligned(const void* data) { return reinterpret_cast<std::uintptr_t>(data) % kAlignment == 0; }

int linear_index(const std::string& stem) {
  static constexpr const char* kStems[] = {"attn.qkv", "attn.o", "mlp.gate_up", "mlp.down"};  // as enum Linear
  const auto* found = std::find(std::begin(kStems), std::end(kStems), stem);
  if (found == std::end(kStems)) refuse("an adapter is for " + stem + ", which the decoder does not have");
  return static_cast<int>(found - std::begin(kStems));
}

bool is_present(const std::string& role) {
  return role == "present_key" || role == "present_value" || role == "present_kv";
}

bool is_capturing(cudaStream_t stream) {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  EDGELLM_CUDA_TRY(cudaStreamIsCapturing(stream, &status));
  return status != cudaStreamCaptureStatusNone;
}

}  // namespace

Context::Context(Engine& engine, ExecutionContextAllocationStrategy strategy)
    : engine_(engine), of_engine_(engine.contexts().ticket()), reporter_(engine.reporter()), strategy_(strategy) {
  for (const Binding& binding : engine.plan().bindings) states_[binding.name];
  if (strategy_ == ExecutionContextAllocationStrategy::kUSER_MANAGED) return;
  own_memory_ = DeviceBuffer(engine.getDeviceMemorySize());
  memory_ = own_memory_.data();
  memory_bytes_ = own_memory_.size();
}

const Binding* Context::find(char const* name) const noexcept {
  const Binding* binding = name == nullptr ? nullptr : engine_.plan().find(name);
  if (binding == nullptr) reporter_.error(std::string("there is no tensor ") + (name == nullptr ? "(null)" : name));
  return binding;
}

Sizes Context::shape_of(const Binding& binding) const {
  if (binding.is_input) {
    const State& state = states_.find(binding.name)->second;
    if (state.shape) return *state.shape;
    return engine_.fixed_shape(binding, profile_).value_or(binding.shape);
  }
  // An output's varying sizes are those of the input that it follows.
  const char* follows = binding.role == "logits"        ? "logit_indices"
                        : binding.role == "present_key" ? "past_key"
                        : binding.role == "present_kv"  ? "past_kv"
                                                        : "past_value";
  Sizes sizes = binding.shape;
  for (const Binding& input : engine_.plan().bindings) {
    if (input.role != follows || input.layer != binding.layer || sizes.empty()) continue;
    const Sizes source = shape_of(input);
    if (!source.empty() && sizes[0] == -1) sizes[0] = source[0];
  }
  return sizes;
}

std::size_t Context::bytes_of(const Binding& binding) const {
  std::size_t bytes = size_of(binding.dtype);
  for (const std::int64_t size : shape_of(binding)) bytes *= static_cast<std::size_t>(std::max<std::int64_t>(size, 0));
  return bytes;
}

bool Context::setOptimizationProfileAsync(int32_t profile, cudaStream_t stream) noexcept {
  try {
    if (profile < 0 || profile >= engine_.getNbOptimizationProfiles()) {
      refuse("there is no profile " + std::to_string(profile) + " of " +
             std::to_string(engine_.getNbOptimizationProfiles()));
    }
    if (engine_.forward() != nullptr && is_capturing(stream)) refuse("a profile is chosen while the stream captures");
    profile_ = profile;
    for (auto& [name, state] : states_) state.shape.reset();  // to be set again
    has_news_ = true;
    return true;
  } catch (const std::exception& error) {
    reporter_.error(error.what());
    return false;
  }
}

bool Context::setInputShape(char const* name, Dims const& dims) noexcept {
  const Binding* binding = find(name);
  if (binding == nullptr) return false;
  const Sizes sizes = to_sizes(dims);
  const std::string what = binding->name + " " + to_string(sizes);
  if (!binding->is_input) {
    reporter_.error(what + ": it is an output");
    return false;
  }
  const ShapeRange& range = profile().find(binding->name)->second;
  bool fits = sizes.size() == binding->shape.size();
  for (std::size_t i = 0; fits && i < sizes.size(); ++i) {
    fits = (binding->shape[i] == -1 || binding->shape[i] == sizes[i]) && sizes[i] >= range.smallest[i] &&
           sizes[i] <= range.largest[i];
  }
  if (!fits) {
    reporter_.error(what + " is outside profile " + std::to_string(profile_) + ", which allows " +
                    to_string(range.smallest) + " to " + to_string(range.largest));
    return false;
  }
  State& state = states_.find(binding->name)->second;
  if (state.shape != sizes) has_news_ = true;
  state.shape = sizes;
  return true;
}

Dims Context::getTensorShape(char const* name) const noexcept {
  const Binding* binding = find(name);
  return binding != nullptr ? to_dims(shape_of(*binding)) : Dims{-1, {}};
}

Dims Context::getTensorStrides(char const* name) const noexcept {
  const Binding* binding = find(name);
  if (binding == nullptr) return Dims{-1, {}};
  const Sizes sizes = shape_of(*binding);
  if (!is_known(sizes)) return Dims{-1, {}};
  Sizes strides(sizes.size(), 1);
  for (std::size_t i = sizes.size(); i-- > 1;) strides[i - 1] = strides[i] * sizes[i];
  return to_dims(strides);
}

bool Context::set_address(const Binding& binding, void* data) noexcept {
  if (!is_aligned(data)) {
    reporter_.error("the address of " + binding.name + " is not a multiple of " + std::to_string(kAlignment));
    return false;
  }
  states_.find(binding.name)->second.address = static_cast<std::byte*>(data);
  return true;
}

bool Context::setTensorAddress(char const* name, void* data) noexcept {
  const Binding* binding = find(name);
  return binding != nullptr && set_address(*binding, data);
}

bool Context::setInputTensorAddress(char const* name, void const* data) noexcept {
  const Binding* binding = find(name);
  if (binding == nullptr) return false;
  if (!binding->is_input) {
    reporter_.error(binding->name + " is an output");
    return false;
  }
  return set_address(*binding, const_cast<void*>(data));
}

bool Context::setOutputTensorAddress(char const* name, void* data) noexcept {
  const Binding* binding = find(name);
  if (binding == nullptr) return false;
  if (binding->is_input) {
    reporter_.error(binding->name + " is an input");
    return false;
  }
  return set_address(*binding, data);
}

void const* Context::getTensorAddress(char const* name) const noexcept {
  const Binding* binding = find(name);
  return binding != nullptr ? states_.find(binding->name)->second.address : nullptr;
}

void* Context::getOutputTensorAddress(char const* name) const noexcept {
  const Binding* binding = find(name);
  return binding != nullptr && !binding->is_input ? states_.find(binding->name)->second.address : nullptr;
}

bool Context::allInputDimensionsSpecified() const noexcept {
  const auto& bindings = engine_.plan().bindings;
  return std::all_of(bindings.begin(), bindings.end(),
                     [this](const Binding& b) { return !b.is_input || is_known(shape_of(b)); });
}

int32_t Context::inferShapes(int32_t most_names, char const** names) noexcept {
  if (most_names < 0 || (names == nullptr && most_names != 0)) return -1;
  int32_t count = 0;
  for (const Binding& binding : engine_.plan().bindings) {
    if (!binding.is_input || is_known(shape_of(binding))) continue;
    if (count < most_names) names[count] = binding.name.c_str();
    ++count;
  }
  return count;
}

bool Context::setInputConsumedEvent(cudaEvent_t event) noexcept {
  consumed_ = event;
  return true;
}

int64_t Context::getMaxOutputSize(char const* name) const noexcept {
  const Binding* binding = find(name);
  if (binding == nullptr || binding->is_input) return -1;
  const Limits limits = limits_of(engine_.plan(), profile());
  auto bytes = static_cast<std::int64_t>(size_of(binding->dtype));
  for (const std::int64_t size : binding->shape) {
    bytes *= size != -1 ? size : binding->role == "logits" ? limits.num_logits : limits.batch;
  }
  return bytes;
}

std::size_t Context::updateDeviceMemorySizeForShapes() noexcept { return engine_.workspace(profile_).total(); }

void Context::setDeviceMemory(void* memory) noexcept {
  setDeviceMemoryV2(memory, static_cast<int64_t>(engine_.getDeviceMemorySize()));
}

void Context::setDeviceMemoryV2(void* memory, int64_t size) noexcept {
  if (strategy_ != ExecutionContextAllocationStrategy::kUSER_MANAGED) {
    reporter_.error("device memory is given to a context that has its own");
    return;
  }
  if (size < 0 || !is_aligned(memory)) {
    reporter_.error("device memory has " + std::to_string(size) + " bytes, at an address that must be a multiple of " +
                    std::to_string(kAlignment));
    return;
  }
  memory_ = static_cast<std::byte*>(memory);
  memory_bytes_ = static_cast<std::size_t>(size);
  has_news_ = true;
}

BoundTensors Context::bound() const {
  const DecoderConfig& decoder = engine_.plan().decoder;
  BoundTensors bound;
  bound.keys.resize(static_cast<std::size_t>(decoder.num_layers));
  bound.values.resize(bound.keys.size());
  const auto agree = [](int& known, std::int64_t size, const Binding& binding, const char* what) {
    if (known != 0 && known != size) {
      refuse(binding.name + " has " + what + " " + std::to_string(size) + ", another input " + std::to_string(known));
    }
    known = static_cast<int>(size);
  };
  for (const Binding& binding : engine_.plan().bindings) {
    const Sizes sizes = shape_of(binding);
    std::byte* address = states_.find(binding.name)->second.address;
    if (!is_known(sizes))
      refuse("the shape of " + binding.name + " is not set for profile " + std::to_string(profile_));
    if (address == nullptr) refuse("the address of " + binding.name + " is not set");
    const auto layer = static_cast<std::size_t>(std::max(binding.layer, 0));
    if (layer >= bound.keys.size()) refuse(binding.name + " is of a layer that the decoder does not have");
    const std::string& role = binding.role;
    if (role == "embeds") {
      agree(bound.batch, sizes.at(0), binding, "batch");
      agree(bound.length, sizes.at(1), binding, "length");
      bound.embeds = address;
    } else if (role == "positions") {
      agree(bound.batch, sizes.at(0), binding, "batch");
      agree(bound.length, sizes.at(1), binding, "length");
      bound.positions = reinterpret_cast<std::int64_t*>(address);
    } else if (role == "write_indices") {
      agree(bound.batch, sizes.at(0), binding, "batch");
      bound.write_indices = reinterpret_cast<std::int64_t*>(address);
    } else if (role == "logit_indices") {
      bound.num_logits = static_cast<int>(sizes.at(0));
      bound.logit_indices = reinterpret_cast<std::int64_t*>(address);
    } else if (role == "logits") {
      bound.logits = reinterpret_cast<float*>(address);
    } else if (role == "past_key" || role == "past_value") {
      agree(bound.batch, sizes.at(0), binding, "batch");
      (role == "past_key" ? bound.keys : bound.values)[layer] = address;
    } else if (role == "past_kv") {
      agree(bound.batch, sizes.at(0), binding, "batch");
      bound.together = true;
      bound.keys[layer] = address;
      bound.values[layer] = address + bytes_of(binding) / static_cast<std::size_t>(2 * sizes.at(0));
    } else if (role == "mask" || role == "tree_masks") {
      agree(bound.batch, sizes.at(0), binding, "batch");
      agree(bound.length, sizes.at(role == "mask" ? 2 : 1), binding, "length");
      if (role == "mask" && sizes.at(3) != decoder.capacity) {
        refuse(binding.name + " is for " + std::to_string(sizes.at(3)) + " places, the cache has " +
               std::to_string(decoder.capacity));
      }
      if (role == "mask") bound.masks.push_back({binding.window, address});
      if (role == "tree_masks") bound.tree_masks = reinterpret_cast<std::int64_t*>(address);
    } else if (role == "lora_a" || role == "lora_b") {
      bound.loras.resize(bound.keys.size());
      BoundLora& lora = bound.loras[layer][static_cast<std::size_t>(linear_index(binding.stem))];
      const bool is_a = role == "lora_a";
      const std::int64_t rank = sizes.at(is_a ? 1 : 0);
      if ((is_a ? lora.b : lora.a) != nullptr && lora.rank != rank) {
        refuse(binding.name + " has rank " + std::to_string(rank) + ", its other half " + std::to_string(lora.rank));
      }
      lora.rank = static_cast<int>(rank);
      (is_a ? lora.a : lora.b) = address;
    } else if (!is_present(role)) {
      refuse("the double does not know what " + binding.name + " is for ('" + role + "')");
    }
  }
  for (const Binding& binding : engine_.plan().bindings) {
    if (!is_present(binding.role)) continue;
    const auto& caches = binding.role == "present_value" ? bound.values : bound.keys;
    if (states_.find(binding.name)->second.address != caches.at(static_cast<std::size_t>(binding.layer))) {
      refuse("the cache is updated in place, but " + binding.name +
             " has another address than the input that it is of");
    }
  }
  for (const int window : windows_of(decoder)) {
    const auto has = [&](const BoundMask& mask) { return mask.window == window; };
    if (bound.masks.empty() || std::any_of(bound.masks.begin(), bound.masks.end(), has)) continue;
    refuse("the plan has no mask for the layers with window " + std::to_string(window));
  }
  const auto missing = [](const std::vector<void*>& of) {
    return std::find(of.begin(), of.end(), nullptr) != of.end();
  };
  if (bound.embeds == nullptr || bound.positions == nullptr || bound.write_indices == nullptr ||
      bound.logit_indices == nullptr || bound.logits == nullptr || missing(bound.keys) || missing(bound.values)) {
    refuse("the plan has not every input and output of a decoder");
  }
  return bound;
}

std::byte* Context::memory() const {
  const std::size_t needed = engine_.workspace(profile_).total();
  if (memory_ == nullptr) refuse("device memory is not set; " + std::to_string(needed) + " bytes are needed");
  if (memory_bytes_ < needed) {
    refuse("device memory has " + std::to_string(memory_bytes_) + " bytes; profile " + std::to_string(profile_) +
           " needs " + std::to_string(needed));
  }
  return memory_;
}

// Everything that is written must be apart from everything else, but for a cache from its own past.
void Context::check_overlaps(const std::byte* memory) const {
  struct Range {
    const std::byte* begin;
    const std::byte* end;
    std::string name;
    bool is_written;
  };
  std::vector<Range> ranges = {{memory, memory + engine_.workspace(profile_).total(), "device memory", true}};
  for (const Binding& binding : engine_.plan().bindings) {
    if (binding.role.starts_with("past_")) continue;  // where the present is
    const std::byte* begin = states_.find(binding.name)->second.address;
    ranges.push_back({begin, begin + bytes_of(binding), binding.name, !binding.is_input});
  }
  std::erase_if(ranges, [](const Range& range) { return range.begin == range.end; });
  for (const Range& written : ranges) {
    if (!written.is_written) continue;
    for (const Range& other : ranges) {
      if (&written != &other && written.begin < other.end && other.begin < written.end) {
        refuse(written.name + " overlaps " + other.name);
      }
    }
  }
}

void Context::check_capture(cudaStream_t stream) const {
  if (has_news_ && is_capturing(stream)) {
    refuse(
        "this enqueue is captured, but the profile, shapes or device memory changed since the last one; call "
        "enqueueV3 once without capture first, as TensorRT asks for");
  }
}

bool Context::enqueueV3(cudaStream_t stream) noexcept {
  try {
    if (engine_.count_enqueue() == engine_.plan().faults.enqueue)
      throw std::runtime_error("this enqueue was told to fail");
    if (engine_.forward() == nullptr) throw std::runtime_error("there is no CUDA device");
    const BoundTensors tensors = bound();
    std::byte* const own = memory();
    check_overlaps(own);
    check_capture(stream);
    engine_.forward()->enqueue_async(tensors, engine_.workspace(profile_), own, stream);
    if (consumed_ != nullptr) EDGELLM_CUDA_TRY(cudaEventRecord(consumed_, stream));
    has_news_ = false;
    return true;
  } catch (const std::exception& error) {
    reporter_.error(std::string("enqueueV3: ") + error.what(), nvinfer1::ErrorCode::kFAILED_EXECUTION);
    return false;
  }
}

}  // namespace edgellm::nvinfer_double
