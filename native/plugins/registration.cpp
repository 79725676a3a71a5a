// How TensorRT finds the plugins: IPluginRegistry::loadLibrary calls setLoggerFinder and getCreators; a program that
// loads this library itself calls initLibEdgeLLMPlugins. Nothing of TensorRT is linked: any of its libraries will do.
#include <dlfcn.h>

#include <array>

#include "attention_plugin.hpp"
#include "gemm_plugin.hpp"
#include "report.hpp"

#define EDGELLM_EXPORT extern "C" __attribute__((visibility("default")))

namespace edgellm::plugins {
namespace {

std::array<nvinfer1::IPluginCreatorInterface*, 3>& creators() {
  static Creator<AttentionPlugin, AttentionSettings> attention;
  static Creator<GemmPlugin<4>, GemmSettings> int4_gemm;
  static Creator<GemmPlugin<8>, GemmSettings> int8_gemm;
  static std::array<nvinfer1::IPluginCreatorInterface*, 3> all = {&attention, &int4_gemm, &int8_gemm};
  return all;
}

// The registry of the TensorRT that this process has loaded, whichever library that is.
nvinfer1::IPluginRegistry* find_registry() {
  using GetRegistry = nvinfer1::IPluginRegistry* (*)();
  constexpr const char* kSymbol = "getPluginRegistry";
  void* found = dlsym(RTLD_DEFAULT, kSymbol);
  for (const char* name : {"libnvinfer.so.10", "libnvinfer_lean.so.10", "libnvinfer_dispatch.so.10"}) {
    if (found) break;
    if (void* library = dlopen(name, RTLD_NOW | RTLD_NOLOAD)) {
      found = dlsym(library, kSymbol);
      dlclose(library);
    }
  }
  return found ? reinterpret_cast<GetRegistry>(found)() : nullptr;
}

}  // namespace
}  // namespace edgellm::plugins

EDGELLM_EXPORT void setLoggerFinder(nvinfer1::ILoggerFinder* finder) { edgellm::plugins::set_logger_finder(finder); }

EDGELLM_EXPORT nvinfer1::IPluginCreatorInterface* const* getCreators(std::int32_t& count) {
  count = static_cast<std::int32_t>(edgellm::plugins::creators().size());
  return edgellm::plugins::creators().data();
}

// Registers what is not registered yet. logger: an nvinfer1::ILogger that outlives the plugins, or null. Returns
// whether all are there; false too where no TensorRT is loaded.
EDGELLM_EXPORT bool initLibEdgeLLMPlugins(void* logger) {
  using namespace edgellm::plugins;
  if (logger) set_logger(static_cast<nvinfer1::ILogger*>(logger));
  return guarded("initLibEdgeLLMPlugins", false, [] {
    nvinfer1::IPluginRegistry* registry = find_registry();
    if (!registry) throw std::runtime_error("no TensorRT is loaded in this process; load libnvinfer.so.10 first");
    bool all = true;
    for (nvinfer1::IPluginCreatorInterface* creator : creators()) {
      const auto* mine = static_cast<nvinfer1::IPluginCreatorV3One*>(creator);
      if (registry->getCreator(mine->getPluginName(), kVersion, kNamespace)) continue;
      all = registry->registerCreator(*creator, kNamespace) && all;
    }
    return all;
  });
}
