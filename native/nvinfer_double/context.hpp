// IExecutionContext of the double: shapes, addresses and device memory as TensorRT has them, checked more strictly.
#pragma once

#include <NvInferRuntime.h>

#include <cstddef>
#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <vector>

#include "edgellm/memory.hpp"
#include "engine.hpp"
#include "handle.hpp"

namespace edgellm::nvinfer_double {

class Context final : public nvinfer1::apiv::VExecutionContext {
 public:
  Context(Engine& engine, nvinfer1::ExecutionContextAllocationStrategy strategy);
  void set_handle(nvinfer1::IExecutionContext* handle) noexcept { handle_ = handle; }

  nvinfer1::IExecutionContext* getPImpl() noexcept override { return handle_; }
  void setDebugSync(bool) noexcept override {}
  bool getDebugSync() const noexcept override { return false; }
  void setProfiler(nvinfer1::IProfiler*) noexcept override { reporter_.lacks("profiler"); }
  nvinfer1::IProfiler* getProfiler() const noexcept override { return nullptr; }
  nvinfer1::ICudaEngine const& getEngine() const noexcept override { return *engine_.getPImpl(); }
  void setName(char const* name) noexcept override { name_ = name; }
  char const* getName() const noexcept override { return name_.c_str(); }
  void setDeviceMemory(void* memory) noexcept override;
  int32_t getOptimizationProfile() const noexcept override { return profile_; }
  bool allInputDimensionsSpecified() const noexcept override;
  bool allInputShapesSpecified() const noexcept override { return true; }
  void setErrorRecorder(nvinfer1::IErrorRecorder* recorder) noexcept override { reporter_.set_recorder(recorder); }
  nvinfer1::IErrorRecorder* getErrorRecorder() const noexcept override { return reporter_.recorder(); }
  bool executeV2(void* const*) noexcept override { return reporter_.lacks("executeV2; use enqueueV3"); }
  bool setOptimizationProfileAsync(int32_t profile, cudaStream_t stream) noexcept override;
  void setEnqueueEmitsProfile(bool) noexcept override {}
  bool getEnqueueEmitsProfile() const noexcept override { return true; }
  bool reportToProfiler() const noexcept override { return reporter_.lacks("profiler"); }
  bool setInputShape(char const* name, nvinfer1::Dims const& dims) noexcept override;
  nvinfer1::Dims getTensorShape(char const* name) const noexcept override;
  nvinfer1::Dims getTensorStrides(char const* name) const noexcept override;
  bool setTensorAddress(char const* name, void* data) noexcept override;
  void const* getTensorAddress(char const* name) const noexcept override;
  bool setInputTensorAddress(char const* name, void const* data) noexcept override;
  bool setOutputTensorAddress(char const* name, void* data) noexcept override;
  int32_t inferShapes(int32_t most_names, char const** names) noexcept override;
  bool setInputConsumedEvent(cudaEvent_t event) noexcept override;
  cudaEvent_t getInputConsumedEvent() const noexcept override { return consumed_; }
  void* getOutputTensorAddress(char const* name) const noexcept override;
  bool setOutputAllocator(char const*, nvinfer1::IOutputAllocator*) noexcept override {
    return reporter_.lacks("output allocator");
  }
  nvinfer1::IOutputAllocator* getOutputAllocator(char const*) noexcept override { return nullptr; }
  int64_t getMaxOutputSize(char const* name) const noexcept override;
  bool setTemporaryStorageAllocator(nvinfer1::IGpuAllocator*) noexcept override {
    return reporter_.lacks("temporary storage");
  }
  nvinfer1::IGpuAllocator* getTemporaryStorageAllocator() const noexcept override { return nullptr; }
  bool enqueueV3(cudaStream_t stream) noexcept override;
  void setPersistentCacheLimit(std::size_t) noexcept override {}
  std::size_t getPersistentCacheLimit() const noexcept override { return 0; }
  bool setNvtxVerbosity(nvinfer1::ProfilingVerbosity) noexcept override { return true; }
  nvinfer1::ProfilingVerbosity getNvtxVerbosity() const noexcept override {
    return nvinfer1::ProfilingVerbosity::kNONE;
  }
  void setAuxStreams(cudaStream_t*, int32_t) noexcept override {}
  bool setDebugListener(nvinfer1::IDebugListener*) noexcept override { return reporter_.lacks("debug listener"); }
  nvinfer1::IDebugListener* getDebugListener() noexcept override { return nullptr; }
  bool setTensorDebugState(char const*, bool) noexcept override { return reporter_.lacks("debug tensors"); }
  bool getDebugState(char const*) const noexcept override { return false; }
  bool setAllTensorsDebugState(bool) noexcept override { return reporter_.lacks("debug tensors"); }
  std::size_t updateDeviceMemorySizeForShapes() noexcept override;
  void setDeviceMemoryV2(void* memory, int64_t size) noexcept override;
  nvinfer1::IRuntimeConfig* getRuntimeConfig() const noexcept override { return nullptr; }
  bool setUnfusedTensorsDebugState(bool) noexcept override { return reporter_.lacks("debug tensors"); }
  bool getUnfusedTensorsDebugState() const noexcept override { return false; }

 private:
  struct State {
    std::optional<Sizes> shape;  // of an input, as set
    std::byte* address = nullptr;
  };

  const Binding* find(char const* name) const noexcept;
  const Profile& profile() const { return engine_.plan().profiles[static_cast<std::size_t>(profile_)]; }
  // Sizes with -1 for those that are not known yet.
  Sizes shape_of(const Binding& binding) const;
  std::size_t bytes_of(const Binding& binding) const;
  bool set_address(const Binding& binding, void* data) noexcept;
  // These throw std::invalid_argument that says what of an enqueue is wrong.
  BoundTensors bound() const;
  std::byte* memory() const;
  void check_overlaps(const std::byte* memory) const;
  void check_capture(cudaStream_t stream) const;

  Engine& engine_;
  Dependents::Ticket of_engine_;
  Reporter reporter_;
  nvinfer1::ExecutionContextAllocationStrategy strategy_;
  nvinfer1::IExecutionContext* handle_ = nullptr;
  std::string name_;
  int profile_ = 0;
  std::map<std::string, State, std::less<>> states_;
  std::byte* memory_ = nullptr;  // the caller's, or own_memory_'s
  std::size_t memory_bytes_ = 0;
  DeviceBuffer own_memory_;
  cudaEvent_t consumed_ = nullptr;
  // Shapes or the profile changed since the last enqueue that ran: TensorRT's next one may do work that must not be
  // captured.
  bool has_news_ = true;
};

}  // namespace edgellm::nvinfer_double
