// ICudaEngine of the double: answers from the plan, and owns the weights where there is a GPU.
#pragma once

#include <NvInferRuntime.h>

#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "forward.hpp"
#include "handle.hpp"
#include "plan.hpp"
#include "reporter.hpp"

namespace edgellm::nvinfer_double {

nvinfer1::Dims to_dims(const Sizes& sizes);
Sizes to_sizes(const nvinfer1::Dims& dims);
constexpr std::size_t kAlignment = 256;  // of every address that is bound

class Engine final : public nvinfer1::apiv::VCudaEngine {
 public:
  // Uploads the weights if there is a CUDA device. Throws std::exception for what is no plan, or asks to be refused.
  Engine(std::span<const std::byte> blob, const Reporter& reporter, const Dependents& engines_of_runtime);
  ~Engine() override;
  Engine(const Engine&) = delete;
  Engine& operator=(const Engine&) = delete;

  const Plan& plan() const noexcept { return plan_; }
  const MemoryPlan& workspace(int profile) const { return workspaces_[static_cast<std::size_t>(profile)]; }
  Forward* forward() const noexcept { return forward_.get(); }  // null without a CUDA device
  const Reporter& reporter() const noexcept { return reporter_; }
  // Of an input whose sizes follow from the plan, or are all given by the profile; else nothing.
  std::optional<Sizes> fixed_shape(const Binding& binding, int profile) const;

  void set_handle(nvinfer1::ICudaEngine* handle) noexcept { handle_ = handle; }
  const Dependents& contexts() const noexcept { return contexts_; }
  std::int64_t count_enqueue() noexcept { return ++num_enqueued_; }  // of all contexts

  nvinfer1::ICudaEngine* getPImpl() noexcept override { return handle_; }
  int32_t getNbLayers() const noexcept override { return 1; }
  nvinfer1::IHostMemory* serialize() const noexcept override;
  nvinfer1::IExecutionContext* createExecutionContext(
      nvinfer1::ExecutionContextAllocationStrategy strategy) noexcept override;
  nvinfer1::IExecutionContext* createExecutionContextWithoutDeviceMemory() noexcept override;
  std::size_t getDeviceMemorySize() const noexcept override;
  bool isRefittable() const noexcept override { return false; }
  char const* getName() const noexcept override { return "edgellm_ros double of nvinfer"; }
  int32_t getNbOptimizationProfiles() const noexcept override { return static_cast<int32_t>(plan_.profiles.size()); }
  int32_t const* getProfileTensorValues(char const* name, int32_t profile,
                                        nvinfer1::OptProfileSelector select) const noexcept override;
  nvinfer1::EngineCapability getEngineCapability() const noexcept override {
    return nvinfer1::EngineCapability::kSTANDARD;
  }
  void setErrorRecorder(nvinfer1::IErrorRecorder* recorder) noexcept override { reporter_.set_recorder(recorder); }
  nvinfer1::IErrorRecorder* getErrorRecorder() const noexcept override { return reporter_.recorder(); }
  bool hasImplicitBatchDimension() const noexcept override { return false; }
  nvinfer1::TacticSources getTacticSources() const noexcept override { return 0; }
  nvinfer1::ProfilingVerbosity getProfilingVerbosity() const noexcept override {
    return nvinfer1::ProfilingVerbosity::kLAYER_NAMES_ONLY;
  }
  nvinfer1::IEngineInspector* createEngineInspector() const noexcept override;
  nvinfer1::Dims getTensorShape(char const* name) const noexcept override;
  nvinfer1::DataType getTensorDataType(char const* name) const noexcept override;
  nvinfer1::TensorLocation getTensorLocation(char const* name) const noexcept override;
  bool isShapeInferenceIO(char const* name) const noexcept override;
  nvinfer1::TensorIOMode getTensorIOMode(char const* name) const noexcept override;
  int32_t getTensorBytesPerComponent(char const* name) const noexcept override;
  int32_t getTensorComponentsPerElement(char const* name) const noexcept override;
  nvinfer1::TensorFormat getTensorFormat(char const* name) const noexcept override;
  char const* getTensorFormatDesc(char const* name) const noexcept override;
  int32_t getTensorVectorizedDim(char const* name) const noexcept override;
  nvinfer1::Dims getProfileShape(char const* name, int32_t profile,
                                 nvinfer1::OptProfileSelector select) const noexcept override;
  int32_t getNbIOTensors() const noexcept override { return static_cast<int32_t>(plan_.bindings.size()); }
  char const* getIOTensorName(int32_t index) const noexcept override;
  nvinfer1::HardwareCompatibilityLevel getHardwareCompatibilityLevel() const noexcept override {
    return {};  // kNONE
  }
  int32_t getNbAuxStreams() const noexcept override { return 0; }
  int32_t getTensorBytesPerComponentV2(char const* name, int32_t) const noexcept override {
    return getTensorBytesPerComponent(name);
  }
  int32_t getTensorComponentsPerElementV2(char const* name, int32_t) const noexcept override {
    return getTensorComponentsPerElement(name);
  }
  nvinfer1::TensorFormat getTensorFormatV2(char const* name, int32_t) const noexcept override {
    return getTensorFormat(name);
  }
  char const* getTensorFormatDescV2(char const* name, int32_t) const noexcept override {
    return getTensorFormatDesc(name);
  }
  int32_t getTensorVectorizedDimV2(char const* name, int32_t) const noexcept override {
    return getTensorVectorizedDim(name);
  }
  nvinfer1::ISerializationConfig* createSerializationConfig() noexcept override;
  nvinfer1::IHostMemory* serializeWithConfig(nvinfer1::ISerializationConfig& config) const noexcept override;
  std::size_t getDeviceMemorySizeForProfile(int32_t profile) const noexcept override;
  nvinfer1::IRefitter* createRefitter(nvinfer1::ILogger& logger) noexcept override;
  bool setWeightStreamingBudget(int64_t) noexcept override { return reporter_.lacks("weight streaming"); }
  int64_t getWeightStreamingBudget() const noexcept override { return 0; }
  int64_t getMinimumWeightStreamingBudget() const noexcept override { return 0; }
  int64_t getStreamableWeightsSize() const noexcept override { return 0; }
  bool isDebugTensor(char const*) const noexcept override { return false; }
  bool setWeightStreamingBudgetV2(int64_t) noexcept override { return reporter_.lacks("weight streaming"); }
  int64_t getWeightStreamingBudgetV2() const noexcept override { return 0; }
  int64_t getWeightStreamingAutomaticBudget() const noexcept override { return 0; }
  int64_t getWeightStreamingScratchMemorySize() const noexcept override { return 0; }
  int64_t getDeviceMemorySizeV2() const noexcept override { return static_cast<int64_t>(getDeviceMemorySize()); }
  int64_t getDeviceMemorySizeForProfileV2(int32_t profile) const noexcept override {
    return static_cast<int64_t>(getDeviceMemorySizeForProfile(profile));
  }
  int64_t const* getProfileTensorValuesV2(char const* name, int32_t profile,
                                          nvinfer1::OptProfileSelector select) const noexcept override;
  nvinfer1::IExecutionContext* createExecutionContextWithRuntimeConfig(
      nvinfer1::IRuntimeConfig* config) noexcept override;
  nvinfer1::IRuntimeConfig* createRuntimeConfig() noexcept override;
  int64_t getEngineStat(nvinfer1::EngineStat stat) const noexcept override;

 private:
  const Binding* find(char const* name) const noexcept;

  Reporter reporter_;
  Plan plan_;
  std::vector<MemoryPlan> workspaces_;  // one a profile
  std::unique_ptr<Forward> forward_;
  std::size_t weight_bytes_ = 0;
  std::int64_t num_enqueued_ = 0;
  Dependents contexts_;
  nvinfer1::ICudaEngine* handle_ = nullptr;
  Dependents::Ticket of_runtime_;
};

}  // namespace edgellm::nvinfer_double
