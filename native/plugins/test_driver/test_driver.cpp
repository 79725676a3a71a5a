// For tests only: calls the plugins through TensorRT's own interface, as TensorRT would, from Python's ctypes.
//
// It is not TensorRT: creators come from the plugin library itself, or from the registry of a real TensorRT library
// that was asked to load it; shapes are computed with an expression builder of its own; enqueue is called on given
// addresses.
#include <NvInferImpl.h>
#include <NvInferRuntime.h>
#include <dlfcn.h>

#include <cstdint>
#include <cstring>
#include <deque>
#include <memory>
#include <string>
#include <vector>

#define EXPORT extern "C" __attribute__((visibility("default")))

namespace {

namespace nv = nvinfer1;

struct Tensor {  // as ctypes fills it
  std::int32_t num_dims;
  std::int32_t type;    // nvinfer1::DataType
  std::int32_t format;  // nvinfer1::TensorFormat
  std::int64_t dims[8];
};

struct Setting {
  const char* name;
  std::int32_t is_real;
  std::int32_t integer;
  float real;
};

class Recorder final : public nv::ILogger, public nv::ILoggerFinder {
 public:
  void log(Severity severity, const char* message) noexcept override {
    if (severity <= Severity::kERROR) last_ = message;
  }
  nv::ILogger* findLogger() override { return this; }
  std::string last_;
};
Recorder the_recorder;

nv::Dims to_dims(const Tensor& tensor) {
  nv::Dims dims{};
  dims.nbDims = tensor.num_dims;
  for (int i = 0; i < tensor.num_dims; i++) dims.d[i] = tensor.dims[i];
  return dims;
}

std::vector<nv::PluginTensorDesc> descs(const Tensor* tensors, int count) {
  std::vector<nv::PluginTensorDesc> all;
  for (int i = 0; i < count; i++) {
    all.push_back({to_dims(tensors[i]), static_cast<nv::DataType>(tensors[i].type),
                   static_cast<nv::TensorFormat>(tensors[i].format), 1.0f});
  }
  return all;
}

// What a build would say: the largest sizes as `max`, and -1 in the shape itself where `varies`.
std::vector<nv::DynamicPluginTensorDesc> dynamic_descs(const Tensor* tensors, int count) {
  std::vector<nv::DynamicPluginTensorDesc> all;
  for (const nv::PluginTensorDesc& desc : descs(tensors, count)) all.push_back({desc, desc.dims, desc.dims, desc.dims});
  return all;
}

// A number, or a symbol that stands for a size which is not known.
class Value final : public nv::apiv::VDimensionExpr {
 public:
  Value(std::int64_t value, bool constant) : value_(value), constant_(constant) {}
  bool isConstant() const override { return constant_; }
  std::int64_t getConstantValue() const override { return value_; }
  bool isSizeTensor() const override { return false; }

 private:
  std::int64_t value_;
  bool constant_;
};

class Expression final : public nv::IDimensionExpr {
 public:
  Expression(std::int64_t value, bool constant) : value_(value, constant) { mImpl = &value_; }
  ~Expression() noexcept override = default;

 private:
  Value value_;
};

class Builder final : public nv::IExprBuilder, nv::apiv::VExprBuilder {
 public:
  Builder() { mImpl = this; }
  ~Builder() noexcept override = default;
  const nv::IDimensionExpr* constant(std::int64_t value) override { return &all_.emplace_back(value, true); }
  const nv::IDimensionExpr* symbol(std::int64_t name) { return &all_.emplace_back(name, false); }
  const nv::IDimensionExpr* operation(nv::DimensionOperation, const nv::IDimensionExpr&,
                                      const nv::IDimensionExpr&) override {
    return nullptr;  // the plugins pass sizes on and set constants
  }
  const nv::IDimensionExpr* declareSizeTensor(std::int32_t, const nv::IDimensionExpr&,
                                              const nv::IDimensionExpr&) override {
    return nullptr;
  }

 private:
  std::deque<Expression> all_;
};

template <class T>
T* capability(void* plugin, nv::PluginCapabilityType type) {
  return static_cast<T*>(static_cast<nv::IPluginV3*>(plugin)->getCapabilityInterface(type));
}
nv::IPluginV3OneBuildV2* build_of(void* plugin) {
  return capability<nv::IPluginV3OneBuildV2>(plugin, nv::PluginCapabilityType::kBUILD);
}
nv::IPluginV3OneRuntime* runtime_of(void* plugin) {
  return capability<nv::IPluginV3OneRuntime>(plugin, nv::PluginCapabilityType::kRUNTIME);
}

}  // namespace

EXPORT const char* driver_last_error() { return the_recorder.last_.c_str(); }
EXPORT void driver_clear_error() { the_recorder.last_.clear(); }

// The creator `name` of the library's own list; null where there is none.
EXPORT void* driver_creator(const char* library, const char* name) {
  void* handle = dlopen(library, RTLD_NOW | RTLD_LOCAL);
  if (!handle) {
    the_recorder.last_ = dlerror();
    return nullptr;
  }
  using SetFinder = void (*)(nv::ILoggerFinder*);
  using GetCreators = nv::IPluginCreatorInterface* const* (*)(std::int32_t&);
  reinterpret_cast<SetFinder>(dlsym(handle, "setLoggerFinder"))(&the_recorder);
  std::int32_t count = 0;
  auto* all = reinterpret_cast<GetCreators>(dlsym(handle, "getCreators"))(count);
  for (std::int32_t i = 0; i < count; i++) {
    auto* creator = static_cast<nv::IPluginCreatorV3One*>(all[i]);
    if (!std::strcmp(creator->getPluginName(), name)) return creator;
  }
  return nullptr;
}

// The registry of the real library `tensorrt`, and in it a creator, after it was told to load `library` (if not null).
EXPORT void* driver_registered(const char* tensorrt, const char* library, const char* name, const char* version,
                               const char* plugin_namespace) {
  void* handle = dlopen(tensorrt, RTLD_NOW | RTLD_LOCAL);
  if (!handle) {
    the_recorder.last_ = dlerror();
    return nullptr;
  }
  using GetRegistry = nv::IPluginRegistry* (*)();
  nv::IPluginRegistry* registry = reinterpret_cast<GetRegistry>(dlsym(handle, "getPluginRegistry"))();
  if (library && !registry->loadLibrary(library)) {
    the_recorder.last_ = "loadLibrary failed";
    return nullptr;
  }
  return registry->getCreator(name, version, plugin_namespace);
}

EXPORT void* driver_create(void* creator, const Setting* settings, std::int32_t count, std::int32_t runtime) {
  std::vector<nv::PluginField> fields;
  for (std::int32_t i = 0; i < count; i++) {
    const Setting& s = settings[i];
    if (s.is_real) {
      fields.emplace_back(s.name, &s.real, nv::PluginFieldType::kFLOAT32, 1);
    } else {
      fields.emplace_back(s.name, &s.integer, nv::PluginFieldType::kINT32, 1);
    }
  }
  const nv::PluginFieldCollection collection{static_cast<std::int32_t>(fields.size()), fields.data()};
  return static_cast<nv::IPluginCreatorV3One*>(static_cast<nv::IPluginCreatorInterface*>(creator))
      ->createPlugin("layer", &collection, runtime ? nv::TensorRTPhase::kRUNTIME : nv::TensorRTPhase::kBUILD);
}

// As from a plan: bytes of the serialised fields, the plugin destroyed, and another made of the bytes alone.
EXPORT void* driver_reread(void* creator, void* plugin) {
  const nv::PluginFieldCollection* given = runtime_of(plugin)->getFieldsToSerialize();
  if (!given) return nullptr;
  std::deque<std::string> texts;
  std::vector<nv::PluginField> fields;
  for (std::int32_t i = 0; i < given->nbFields; i++) {
    const nv::PluginField& field = given->fields[i];
    const char* name = texts.emplace_back(field.name).c_str();
    const auto& bytes =
        texts.emplace_back(static_cast<const char*>(field.data), 4 * static_cast<std::size_t>(field.length));
    fields.emplace_back(name, bytes.data(), field.type, field.length);
  }
  delete static_cast<nv::IPluginV3*>(plugin);
  const nv::PluginFieldCollection collection{static_cast<std::int32_t>(fields.size()), fields.data()};
  return static_cast<nv::IPluginCreatorV3One*>(static_cast<nv::IPluginCreatorInterface*>(creator))
      ->createPlugin("layer", &collection, nv::TensorRTPhase::kRUNTIME);
}

// Field `index` to be serialised, as `Setting`; false past the last.
EXPORT std::int32_t driver_field(void* plugin, std::int32_t index, Setting* to) {
  const nv::PluginFieldCollection* given = runtime_of(plugin)->getFieldsToSerialize();
  if (!given || index >= given->nbFields) return 0;
  const nv::PluginField& field = given->fields[index];
  to->name = field.name;
  to->is_real = field.type == nv::PluginFieldType::kFLOAT32;
  std::memcpy(to->is_real ? static_cast<void*>(&to->real) : &to->integer, field.data, 4);
  return 1;
}

EXPORT void* driver_clone(void* plugin) { return runtime_of(plugin)->attachToContext(nullptr); }
EXPORT void driver_destroy(void* plugin) { delete static_cast<nv::IPluginV3*>(plugin); }
EXPORT std::int32_t driver_num_outputs(void* plugin) { return build_of(plugin)->getNbOutputs(); }
EXPORT std::int32_t driver_aliased_input(void* plugin, std::int32_t output) {
  return build_of(plugin)->getAliasedInput(output);
}
EXPORT const char* driver_identity(void* plugin) {
  static std::string text;
  auto* core = capability<nv::IPluginV3OneCore>(plugin, nv::PluginCapabilityType::kCORE);
  text = std::string(core->getPluginNamespace()) + "::" + core->getPluginName() + " " + core->getPluginVersion();
  return text.c_str();
}

// Sizes below 0 are symbols, and come back as they are where the plugin passes them on.
EXPORT std::int32_t driver_outputs(void* plugin, const Tensor* in, std::int32_t num_in, Tensor* out,
                                   std::int32_t num_out) {
  Builder builder;
  std::vector<nv::DimsExprs> given(num_in), made(num_out);
  std::vector<nv::DataType> types, made_types(num_out);
  for (std::int32_t i = 0; i < num_in; i++) {
    given[i].nbDims = in[i].num_dims;
    for (int d = 0; d < in[i].num_dims; d++) {
      const std::int64_t size = in[i].dims[d];
      given[i].d[d] = size < 0 ? builder.symbol(size) : static_cast<nv::IExprBuilder&>(builder).constant(size);
    }
    types.push_back(static_cast<nv::DataType>(in[i].type));
  }
  nv::IPluginV3OneBuildV2* build = build_of(plugin);
  if (build->getOutputDataTypes(made_types.data(), num_out, types.data(), num_in)) return -1;
  if (build->getOutputShapes(given.data(), num_in, nullptr, 0, made.data(), num_out, builder)) return -2;
  for (std::int32_t i = 0; i < num_out; i++) {
    out[i].num_dims = made[i].nbDims;
    out[i].type = static_cast<std::int32_t>(made_types[i]);
    for (int d = 0; d < made[i].nbDims; d++) out[i].dims[d] = made[i].d[d]->getConstantValue();
  }
  return 0;
}

EXPORT std::int32_t driver_takes(void* plugin, std::int32_t position, const Tensor* tensors, std::int32_t num_in,
                                 std::int32_t num_out) {
  const auto all = dynamic_descs(tensors, num_in + num_out);
  return build_of(plugin)->supportsFormatCombination(position, all.data(), num_in, num_out);
}

EXPORT std::int32_t driver_configure(void* plugin, const Tensor* tensors, std::int32_t num_in, std::int32_t num_out) {
  const auto all = dynamic_descs(tensors, num_in + num_out);
  return build_of(plugin)->configurePlugin(all.data(), num_in, all.data() + num_in, num_out);
}

EXPORT std::int64_t driver_workspace(void* plugin, const Tensor* tensors, std::int32_t num_in, std::int32_t num_out) {
  const auto all = dynamic_descs(tensors, num_in + num_out);
  return static_cast<std::int64_t>(
      build_of(plugin)->getWorkspaceSize(all.data(), num_in, all.data() + num_in, num_out));
}

EXPORT std::int32_t driver_shape_change(void* plugin, const Tensor* tensors, std::int32_t num_in,
                                        std::int32_t num_out) {
  const auto all = descs(tensors, num_in + num_out);
  return runtime_of(plugin)->onShapeChange(all.data(), num_in, all.data() + num_in, num_out);
}

// addresses: of the inputs, then of the outputs.
EXPORT std::int32_t driver_enqueue(void* plugin, const Tensor* tensors, std::int32_t num_in, std::int32_t num_out,
                                   void** addresses, void* workspace, void* stream) {
  const auto all = descs(tensors, num_in + num_out);
  return runtime_of(plugin)->enqueue(all.data(), all.data() + num_in, addresses, addresses + num_in, workspace,
                                     static_cast<cudaStream_t>(stream));
}
