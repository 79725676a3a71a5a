// IRuntime of the double and the C functions that the library exports; no other file has any.
#include <NvInferRuntime.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <stdexcept>
#include <string>
#include <vector>

#include "engine.hpp"
#include "handle.hpp"
#include "plugin_registry.hpp"
#include "reporter.hpp"

namespace edgellm::nvinfer_double {
namespace {

nvinfer1::ILogger* last_logger = nullptr;  // of the runtime made last: what getLogger() returns

class Runtime final : public nvinfer1::apiv::VRuntime {
 public:
  explicit Runtime(nvinfer1::ILogger& logger) : reporter_(logger), registry_(reporter_) {}
  ~Runtime() override {
    if (engines_.count() > 0) reporter_.wrong_order("a runtime is deleted before its engines");
  }
  void set_handle(nvinfer1::IRuntime* handle) noexcept { handle_ = handle; }

  nvinfer1::IRuntime* getPImpl() noexcept override { return handle_; }
  nvinfer1::ICudaEngine* deserializeCudaEngine(void const* blob, std::size_t size) noexcept override {
    try {
      if (blob == nullptr) throw std::invalid_argument("the plan is null");
      const std::span bytes(static_cast<const std::byte*>(blob), size);
      return new Handle<nvinfer1::ICudaEngine, Engine>(std::make_unique<Engine>(bytes, reporter_, engines_));
    } catch (const std::exception& error) {
      reporter_.error(std::string("no engine: ") + error.what(), nvinfer1::ErrorCode::kFAILED_INITIALIZATION);
      return nullptr;
    }
  }
  nvinfer1::ICudaEngine* deserializeCudaEngine(nvinfer1::IStreamReader&) noexcept override {
    reporter_.lacks("reader of IStreamReader; use IStreamReaderV2 or memory");
    return nullptr;
  }
  // Reads host memory in parts until nothing is left.
  nvinfer1::ICudaEngine* deserializeCudaEngineV2(nvinfer1::IStreamReaderV2& reader) noexcept override {
    try {
      std::vector<std::byte> plan;
      constexpr std::size_t kPart = std::size_t{1} << 20;
      for (;;) {
        const std::size_t start = plan.size();
        plan.resize(start + kPart);
        const std::int64_t got = reader.read(plan.data() + start, static_cast<std::int64_t>(kPart), nullptr);
        plan.resize(start + static_cast<std::size_t>(std::max<std::int64_t>(got, 0)));
        if (got <= 0) break;
      }
      return deserializeCudaEngine(plan.data(), plan.size());
    } catch (const std::exception& error) {
      reporter_.error(std::string("no engine: ") + error.what());
      return nullptr;
    }
  }
  void setDLACore(int32_t) noexcept override { reporter_.lacks("DLA"); }
  int32_t getDLACore() const noexcept override { return -1; }
  int32_t getNbDLACores() const noexcept override { return 0; }
  void setGpuAllocator(nvinfer1::IGpuAllocator* allocator) noexcept override {
    if (allocator != nullptr) reporter_.lacks("use for a GPU allocator");
  }
  void setErrorRecorder(nvinfer1::IErrorRecorder* recorder) noexcept override { reporter_.set_recorder(recorder); }
  nvinfer1::IErrorRecorder* getErrorRecorder() const noexcept override { return reporter_.recorder(); }
  nvinfer1::ILogger* getLogger() const noexcept override { return &reporter_.logger(); }
  bool setMaxThreads(int32_t count) noexcept override { return count >= 1; }
  int32_t getMaxThreads() const noexcept override { return 1; }
  void setTemporaryDirectory(char const*) noexcept override {}
  char const* getTemporaryDirectory() const noexcept override { return nullptr; }
  void setTempfileControlFlags(nvinfer1::TempfileControlFlags) noexcept override {}
  nvinfer1::TempfileControlFlags getTempfileControlFlags() const noexcept override { return 0; }
  nvinfer1::IPluginRegistry& getPluginRegistry() noexcept override { return registry_; }
  void setPluginRegistryParent(nvinfer1::IPluginRegistry*) noexcept override {}
  nvinfer1::IRuntime* loadRuntime(char const*) noexcept override {
    reporter_.lacks("lean runtime to load");
    return nullptr;
  }
  void setEngineHostCodeAllowed(bool) noexcept override {}
  bool getEngineHostCodeAllowed() const noexcept override { return false; }

 private:
  Reporter reporter_;
  Registry registry_;
  Dependents engines_;
  nvinfer1::IRuntime* handle_ = nullptr;
};

class SilentLogger final : public nvinfer1::ILogger {
 public:
  void log(Severity, nvinfer1::AsciiChar const*) noexcept override {}
};

}  // namespace
}  // namespace edgellm::nvinfer_double

#define EDGELLM_DOUBLE_EXPORT __attribute__((visibility("default")))

extern "C" {

EDGELLM_DOUBLE_EXPORT void* createInferRuntime_INTERNAL(void* logger, int32_t version) noexcept {
  using namespace edgellm::nvinfer_double;
  if (logger == nullptr) return nullptr;
  auto& caller = *static_cast<nvinfer1::ILogger*>(logger);
  const Reporter reporter(caller);
  if (version / 10000 != NV_TENSORRT_MAJOR) {
    reporter.error("the caller was compiled for TensorRT " + std::to_string(version / 10000) +
                   ", this library stands for " + std::to_string(NV_TENSORRT_MAJOR));
    return nullptr;
  }
  try {
    auto runtime = std::make_unique<Runtime>(caller);
    auto* handle = new Handle<nvinfer1::IRuntime, Runtime>(std::move(runtime));
    last_logger = &caller;
    reporter.info("this is a test double of libnvinfer, not TensorRT: its engines run the project's own kernels");
    return static_cast<nvinfer1::IRuntime*>(handle);
  } catch (const std::exception& error) {
    reporter.error(std::string("no runtime: ") + error.what());
    return nullptr;
  }
}

EDGELLM_DOUBLE_EXPORT void* createInferRefitter_INTERNAL(void*, void* logger, int32_t) noexcept {
  using namespace edgellm::nvinfer_double;
  if (logger != nullptr) Reporter(*static_cast<nvinfer1::ILogger*>(logger)).lacks("refitter");
  return nullptr;
}

EDGELLM_DOUBLE_EXPORT nvinfer1::IPluginRegistry* getPluginRegistry() noexcept {
  using namespace edgellm::nvinfer_double;
  static SilentLogger logger;
  static Registry registry{Reporter(logger)};
  return &registry;
}

EDGELLM_DOUBLE_EXPORT nvinfer1::ILogger* getLogger() noexcept { return edgellm::nvinfer_double::last_logger; }

EDGELLM_DOUBLE_EXPORT int32_t getInferLibVersion() noexcept { return NV_TENSORRT_VERSION; }
EDGELLM_DOUBLE_EXPORT int32_t getInferLibMajorVersion() noexcept { return NV_TENSORRT_MAJOR; }
EDGELLM_DOUBLE_EXPORT int32_t getInferLibMinorVersion() noexcept { return NV_TENSORRT_MINOR; }
EDGELLM_DOUBLE_EXPORT int32_t getInferLibPatchVersion() noexcept { return NV_TENSORRT_PATCH; }
EDGELLM_DOUBLE_EXPORT int32_t getInferLibBuildVersion() noexcept { return NV_TENSORRT_BUILD; }

}  // extern "C"
