// The plugin registry of the double: empty, and it stays so.
#pragma once

#include <NvInferRuntime.h>

#include <cstddef>

#include "reporter.hpp"

namespace edgellm::nvinfer_double {

#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wdeprecated-declarations"  // the interface still has the plugins of before TensorRT 10

// Has no creators and loads no libraries: nothing of the double is made of plugins.
class Registry final : public nvinfer1::IPluginRegistry {
 public:
  explicit Registry(const Reporter& reporter) : reporter_(reporter) {}

  bool registerCreator(nvinfer1::IPluginCreator&, nvinfer1::AsciiChar const*) noexcept override {
    return reporter_.lacks("plugins");
  }
  nvinfer1::IPluginCreator* const* getPluginCreatorList(int32_t* count) const noexcept override { return none(count); }
  nvinfer1::IPluginCreator* getPluginCreator(nvinfer1::AsciiChar const*, nvinfer1::AsciiChar const*,
                                             nvinfer1::AsciiChar const*) noexcept override {
    return nullptr;
  }
  void setErrorRecorder(nvinfer1::IErrorRecorder*) noexcept override {}
  nvinfer1::IErrorRecorder* getErrorRecorder() const noexcept override { return nullptr; }
  bool deregisterCreator(nvinfer1::IPluginCreator const&) noexcept override { return false; }
  bool isParentSearchEnabled() const override { return false; }
  void setParentSearchEnabled(bool) override {}
  PluginLibraryHandle loadLibrary(nvinfer1::AsciiChar const*) noexcept override {
    reporter_.lacks("plugins");
    return nullptr;
  }
  void deregisterLibrary(PluginLibraryHandle) noexcept override {}
  bool registerCreator(nvinfer1::IPluginCreatorInterface&, nvinfer1::AsciiChar const*) noexcept override {
    return reporter_.lacks("plugins");
  }
  nvinfer1::IPluginCreatorInterface* const* getAllCreators(int32_t* count) const noexcept override {
    return none(count);
  }
  nvinfer1::IPluginCreatorInterface* getCreator(nvinfer1::AsciiChar const*, nvinfer1::AsciiChar const*,
                                                nvinfer1::AsciiChar const*) noexcept override {
    return nullptr;
  }
  bool deregisterCreator(nvinfer1::IPluginCreatorInterface const&) noexcept override { return false; }
  nvinfer1::IPluginResource* acquirePluginResource(nvinfer1::AsciiChar const*,
                                                   nvinfer1::IPluginResource*) noexcept override {
    return nullptr;
  }
  int32_t releasePluginResource(nvinfer1::AsciiChar const*) noexcept override { return -1; }
  nvinfer1::IPluginCreatorInterface* const* getAllCreatorsRecursive(int32_t* count) noexcept override {
    return none(count);
  }

 private:
  static std::nullptr_t none(int32_t* count) {
    if (count != nullptr) *count = 0;
    return nullptr;
  }
  Reporter reporter_;
};

#pragma GCC diagnostic pop

}  // namespace edgellm::nvinfer_double
