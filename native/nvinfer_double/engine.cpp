#include "engine.hpp"

#include <algorithm>
#include <stdexcept>

#include "context.hpp"
#include "edgellm/cuda_try.hpp"

namespace edgellm::nvinfer_double {

using nvinfer1::Dims;
using nvinfer1::OptProfileSelector;

namespace {

bool has_cuda_device() {
  int count = 0;
  const bool found = cudaGetDeviceCount(&count) == cudaSuccess && count > 0;
  (void)cudaGetLastError();
  return found;
}

}  // namespace

Dims to_dims(const Sizes& sizes) {
  Dims dims{};
  dims.nbDims = static_cast<int32_t>(sizes.size());
  std::copy(sizes.begin(), sizes.end(), dims.d);
  return dims;
}

Sizes to_sizes(const Dims& dims) {
  return dims.nbDims > 0 ? Sizes(dims.d, dims.d + std::min(dims.nbDims, Dims::MAX_DIMS)) : Sizes{};
}

Engine::Engine(std::span<const std::byte> blob, const Reporter& reporter, const Dependents& engines_of_runtime)
    : reporter_(reporter), plan_(parse_plan(blob)), of_runtime_(engines_of_runtime.ticket()) {
  if (!plan_.faults.deserialize.empty()) throw std::runtime_error(plan_.faults.deserialize);
  const Sizes own = {NV_TENSORRT_MAJOR, NV_TENSORRT_MINOR, NV_TENSORRT_PATCH};
  if (plan_.tensorrt != own) {
    throw std::runtime_error("the plan is of TensorRT " + to_string(plan_.tensorrt) + ", this library stands for " +
                             to_string(own) + "; build the engine again with this version");
  }
  for (const Profile& profile : plan_.profiles) {
    workspaces_.push_back(plan_workspace(plan_.decoder, limits_of(plan_, profile)));
  }
  for (const StoredWeight& weight : plan_.weights) weight_bytes_ += weight.bytes.size();
  if (has_cuda_device()) forward_ = std::make_unique<Forward>(plan_);
  for (StoredWeight& weight : plan_.weights) weight.bytes = {};  // the caller may free the plan now
}

Engine::~Engine() {
  if (contexts_.count() > 0) reporter_.wrong_order("an engine is deleted before its execution contexts");
}

std::optional<Sizes> Engine::fixed_shape(const Binding& binding, int profile) const {
  if (std::find(binding.shape.begin(), binding.shape.end(), -1) == binding.shape.end()) return binding.shape;
  const ShapeRange& range = plan_.profiles[static_cast<std::size_t>(profile)].find(binding.name)->second;
  if (range.smallest == range.largest) return range.largest;
  return std::nullopt;
}

const Binding* Engine::find(char const* name) const noexcept {
  const Binding* binding = name == nullptr ? nullptr : plan_.find(name);
  if (binding == nullptr) reporter_.error(std::string("there is no tensor ") + (name == nullptr ? "(null)" : name));
  return binding;
}

nvinfer1::IExecutionContext* Engine::createExecutionContext(
    nvinfer1::ExecutionContextAllocationStrategy strategy) noexcept {
  try {
    if (!plan_.faults.create_context.empty()) throw std::runtime_error(plan_.faults.create_context);
    return new Handle<nvinfer1::IExecutionContext, Context>(std::make_unique<Context>(*this, strategy));
  } catch (const std::exception& error) {
    reporter_.error(std::string("no execution context: ") + error.what(), nvinfer1::ErrorCode::kFAILED_INITIALIZATION);
    return nullptr;
  }
}

nvinfer1::IExecutionContext* Engine::createExecutionContextWithoutDeviceMemory() noexcept {
  return createExecutionContext(nvinfer1::ExecutionContextAllocationStrategy::kUSER_MANAGED);
}

std::size_t Engine::getDeviceMemorySize() const noexcept {
  std::size_t most = 0;
  for (const MemoryPlan& workspace : workspaces_) most = std::max(most, workspace.total());
  return most;
}

std::size_t Engine::getDeviceMemorySizeForProfile(int32_t profile) const noexcept {
  if (profile < 0 || profile >= getNbOptimizationProfiles()) {
    reporter_.error("there is no profile " + std::to_string(profile));
    return 0;
  }
  return workspace(profile).total();
}

Dims Engine::getTensorShape(char const* name) const noexcept {
  const Binding* binding = find(name);
  return binding != nullptr ? to_dims(binding->shape) : Dims{-1, {}};
}

nvinfer1::DataType Engine::getTensorDataType(char const* name) const noexcept {
  const Binding* binding = find(name);
  return binding != nullptr ? binding->dtype : nvinfer1::DataType::kFLOAT;
}

nvinfer1::TensorLocation Engine::getTensorLocation(char const* name) const noexcept {
  (void)find(name);
  return nvinfer1::TensorLocation::kDEVICE;
}

bool Engine::isShapeInferenceIO(char const* name) const noexcept {
  (void)find(name);
  return false;
}

nvinfer1::TensorIOMode Engine::getTensorIOMode(char const* name) const noexcept {
  const Binding* binding = find(name);
  if (binding == nullptr) return nvinfer1::TensorIOMode::kNONE;
  return binding->is_input ? nvinfer1::TensorIOMode::kINPUT : nvinfer1::TensorIOMode::kOUTPUT;
}

// -1: not a vectorised format, as the real library answers.
int32_t Engine::getTensorBytesPerComponent(char const* name) const noexcept {
  (void)find(name);
  return -1;
}

int32_t Engine::getTensorComponentsPerElement(char const* name) const noexcept {
  (void)find(name);
  return -1;
}

nvinfer1::TensorFormat Engine::getTensorFormat(char const* name) const noexcept {
  (void)find(name);
  return nvinfer1::TensorFormat::kLINEAR;
}

char const* Engine::getTensorFormatDesc(char const* name) const noexcept {
  return find(name) != nullptr ? "row-major linear, of a double of nvinfer" : nullptr;
}

int32_t Engine::getTensorVectorizedDim(char const* name) const noexcept {
  (void)find(name);
  return -1;
}

Dims Engine::getProfileShape(char const* name, int32_t profile, OptProfileSelector select) const noexcept {
  const Binding* binding = find(name);
  if (binding == nullptr || !binding->is_input || profile < 0 || profile >= getNbOptimizationProfiles()) {
    if (binding != nullptr) reporter_.error(binding->name + " has no profile " + std::to_string(profile));
    return Dims{-1, {}};
  }
  const ShapeRange& range = plan_.profiles[static_cast<std::size_t>(profile)].find(binding->name)->second;
  switch (select) {
    case OptProfileSelector::kMIN:
      return to_dims(range.smallest);
    case OptProfileSelector::kOPT:
      return to_dims(range.best);
    default:
      return to_dims(range.largest);
  }
}

char const* Engine::getIOTensorName(int32_t index) const noexcept {
  if (index < 0 || index >= getNbIOTensors()) {
    reporter_.error("there is no tensor number " + std::to_string(index));
    return nullptr;
  }
  return plan_.bindings[static_cast<std::size_t>(index)].name.c_str();
}

int64_t Engine::getEngineStat(nvinfer1::EngineStat stat) const noexcept {
  return stat == nvinfer1::EngineStat::kTOTAL_WEIGHTS_SIZE ? static_cast<int64_t>(weight_bytes_) : -1;
}

int32_t const* Engine::getProfileTensorValues(char const*, int32_t, OptProfileSelector) const noexcept {
  return nullptr;  // no input is a shape
}

int64_t const* Engine::getProfileTensorValuesV2(char const*, int32_t, OptProfileSelector) const noexcept {
  return nullptr;
}

nvinfer1::IHostMemory* Engine::serialize() const noexcept {
  reporter_.lacks("serialisation");
  return nullptr;
}

nvinfer1::IHostMemory* Engine::serializeWithConfig(nvinfer1::ISerializationConfig&) const noexcept {
  return serialize();
}

nvinfer1::ISerializationConfig* Engine::createSerializationConfig() noexcept {
  reporter_.lacks("serialisation");
  return nullptr;
}

nvinfer1::IEngineInspector* Engine::createEngineInspector() const noexcept {
  reporter_.lacks("engine inspector");
  return nullptr;
}

nvinfer1::IRefitter* Engine::createRefitter(nvinfer1::ILogger&) noexcept {
  reporter_.lacks("refitter");
  return nullptr;
}

nvinfer1::IExecutionContext* Engine::createExecutionContextWithRuntimeConfig(nvinfer1::IRuntimeConfig*) noexcept {
  reporter_.lacks("runtime configuration");
  return nullptr;
}

nvinfer1::IRuntimeConfig* Engine::createRuntimeConfig() noexcept {
  reporter_.lacks("runtime configuration");
  return nullptr;
}

}  // namespace edgellm::nvinfer_double
