// What every plugin shares: one object that is its core, build and runtime phase, and a creator that makes it.
//
// A plugin D with settings S gives: kName, fields(), checks in its constructor, the shapes and types of its outputs,
// which formats it takes, its workspace, and enqueue. Everything is checked again when a plan is read.
#pragma once

#include <NvInferRuntime.h>

#include <memory>
#include <vector>

#include "fields.hpp"
#include "report.hpp"
#include "tensors.hpp"

namespace edgellm::plugins {

constexpr const char* kVersion = "1";
constexpr const char* kNamespace = "edgellm";

template <class D, class S>
class PluginBase : public nvinfer1::IPluginV3,
                   public nvinfer1::IPluginV3OneCore,
                   public nvinfer1::IPluginV3OneBuildV2,  // since 10.3; getAliasedInput is what it adds
                   public nvinfer1::IPluginV3OneRuntime {
 public:
  explicit PluginBase(const S& settings) : settings_(settings) {}

  nvinfer1::IPluginCapability* getCapabilityInterface(nvinfer1::PluginCapabilityType type) noexcept override {
    switch (type) {
      case nvinfer1::PluginCapabilityType::kCORE:
        return static_cast<nvinfer1::IPluginV3OneCore*>(this);
      case nvinfer1::PluginCapabilityType::kBUILD:
        return static_cast<nvinfer1::IPluginV3OneBuildV2*>(this);
      case nvinfer1::PluginCapabilityType::kRUNTIME:
        return static_cast<nvinfer1::IPluginV3OneRuntime*>(this);
    }
    return nullptr;
  }
  nvinfer1::IPluginV3* clone() noexcept override {
    return guarded<nvinfer1::IPluginV3*>(D::kName, nullptr, [&] { return new D(settings_); });
  }

  const char* getPluginName() const noexcept override { return D::kName; }
  const char* getPluginVersion() const noexcept override { return kVersion; }
  const char* getPluginNamespace() const noexcept override { return kNamespace; }

  // Called before any shape is known: what a layer cannot have is refused here, by name, while the engine is built.
  std::int32_t configurePlugin(const nvinfer1::DynamicPluginTensorDesc* in, std::int32_t num_in,
                               const nvinfer1::DynamicPluginTensorDesc* out, std::int32_t num_out) noexcept override {
    return guarded(D::kName, -1, [&] {
      std::vector<nvinfer1::PluginTensorDesc> all;
      for (std::int32_t i = 0; i < num_in; i++) all.push_back(in[i].desc);
      for (std::int32_t i = 0; i < num_out; i++) all.push_back(out[i].desc);
      self().check_tensors(all.data(), num_in, all.data() + num_in, num_out);
      return 0;
    });
  }
  std::int32_t onShapeChange(const nvinfer1::PluginTensorDesc* in, std::int32_t num_in,
                             const nvinfer1::PluginTensorDesc* out, std::int32_t num_out) noexcept override {
    return guarded(D::kName, -1, [&] {
      self().check_tensors(in, num_in, out, num_out);
      return 0;
    });
  }
  bool supportsFormatCombination(std::int32_t position, const nvinfer1::DynamicPluginTensorDesc* tensors,
                                 std::int32_t num_in, std::int32_t) noexcept override {
    return guarded(D::kName, false, [&] {
      return tensors[position].desc.format == nvinfer1::TensorFormat::kLINEAR &&
             self().takes(position, num_in, [&](int i) { return tensors[i].desc.type; });
    });
  }
  std::size_t getWorkspaceSize(const nvinfer1::DynamicPluginTensorDesc* in, std::int32_t,
                               const nvinfer1::DynamicPluginTensorDesc*, std::int32_t) const noexcept override {
    return guarded(D::kName, std::size_t{0}, [&] { return self().workspace_bytes(in); });
  }

  nvinfer1::IPluginV3* attachToContext(nvinfer1::IPluginResourceContext*) noexcept override { return clone(); }
  const nvinfer1::PluginFieldCollection* getFieldsToSerialize() noexcept override {
    return guarded<const nvinfer1::PluginFieldCollection*>(D::kName, nullptr, [&] {
      serialized_ = list_fields(D::fields(), &settings_);
      collection_ = {static_cast<std::int32_t>(serialized_.size()), serialized_.data()};
      return &collection_;
    });
  }

 protected:
  S settings_;

 private:
  D& self() { return static_cast<D&>(*this); }
  const D& self() const { return static_cast<const D&>(*this); }

  std::vector<nvinfer1::PluginField> serialized_;
  nvinfer1::PluginFieldCollection collection_;
};

template <class D, class S>
class Creator : public nvinfer1::IPluginCreatorV3One {
 public:
  Creator() : fields_(list_fields<S>(D::fields(), nullptr)) {
    collection_ = {static_cast<std::int32_t>(fields_.size()), fields_.data()};
  }
  nvinfer1::IPluginV3* createPlugin(const char*, const nvinfer1::PluginFieldCollection* given,
                                    nvinfer1::TensorRTPhase) noexcept override {
    return guarded<nvinfer1::IPluginV3*>(D::kName, nullptr, [&] { return new D(read_fields<S>(D::fields(), given)); });
  }
  const nvinfer1::PluginFieldCollection* getFieldNames() noexcept override { return &collection_; }
  const char* getPluginName() const noexcept override { return D::kName; }
  const char* getPluginVersion() const noexcept override { return kVersion; }
  const char* getPluginNamespace() const noexcept override { return kNamespace; }

 private:
  std::vector<nvinfer1::PluginField> fields_;
  nvinfer1::PluginFieldCollection collection_;
};

}  // namespace edgellm::plugins
