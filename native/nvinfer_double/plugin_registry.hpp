// The plugin registry of the double: loads libraries and lists their creators. Nothing of the double is made of
// plugins.
#pragma once

#include <NvInferRuntime.h>

#include <cstddef>
#include <vector>

#include "reporter.hpp"

namespace edgellm::nvinfer_double {

#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wdeprecated-declarations"  // the interface still has the plugins of before TensorRT 10

class Registry final : public nvinfer1::IPluginRegistry {
 public:
  explicit Registry(const Reporter& reporter) : reporter_(reporter), finder_(reporter_) {}
  ~Registry() noexcept override;

  bool registerCreator(nvinfer1::IPluginCreator&, nvinfer1::AsciiChar const*) noexcept override {
    return reporter_.lacks("plugins of before TensorRT 10");
  }
  nvinfer1::IPluginCreator* const* getPluginCreatorList(int32_t* count) const noexcept override {
    if (count != nullptr) *count = 0;
    return nullptr;
  }
  nvinfer1::IPluginCreator* getPluginCreator(nvinfer1::AsciiChar const*, nvinfer1::AsciiChar const*,
                                             nvinfer1::AsciiChar const*) noexcept override {
    return nullptr;
  }
  void setErrorRecorder(nvinfer1::IErrorRecorder* recorder) noexcept override { reporter_.set_recorder(recorder); }
  nvinfer1::IErrorRecorder* getErrorRecorder() const noexcept override { return reporter_.recorder(); }
  bool deregisterCreator(nvinfer1::IPluginCreator const&) noexcept override { return false; }
  bool isParentSearchEnabled() const override { return false; }
  void setParentSearchEnabled(bool) override {}
  PluginLibraryHandle loadLibrary(nvinfer1::AsciiChar const* path) noexcept override;
  void deregisterLibrary(PluginLibraryHandle handle) noexcept override;
  bool registerCreator(nvinfer1::IPluginCreatorInterface& creator,
                       nvinfer1::AsciiChar const* name_space) noexcept override;
  nvinfer1::IPluginCreatorInterface* const* getAllCreators(int32_t* count) const noexcept override;
  nvinfer1::IPluginCreatorInterface* getCreator(nvinfer1::AsciiChar const* name, nvinfer1::AsciiChar const* version,
                                                nvinfer1::AsciiChar const* name_space) noexcept override;
  bool deregisterCreator(nvinfer1::IPluginCreatorInterface const& creator) noexcept override;
  nvinfer1::IPluginResource* acquirePluginResource(nvinfer1::AsciiChar const*,
                                                   nvinfer1::IPluginResource*) noexcept override {
    return nullptr;
  }
  int32_t releasePluginResource(nvinfer1::AsciiChar const*) noexcept override { return -1; }
  nvinfer1::IPluginCreatorInterface* const* getAllCreatorsRecursive(int32_t* count) noexcept override {
    return getAllCreators(count);
  }

 private:
  class Finder final : public nvinfer1::ILoggerFinder {
   public:
    explicit Finder(const Reporter& reporter) : reporter_(reporter) {}
    nvinfer1::ILogger* findLogger() override { return &reporter_.logger(); }

   private:
    const Reporter& reporter_;
  };

  Reporter reporter_;
  Finder finder_;
  std::vector<nvinfer1::IPluginCreatorInterface*> creators_;
  std::vector<void*> libraries_;
};

#pragma GCC diagnostic pop

}  // namespace edgellm::nvinfer_double
