#include "plugin_registry.hpp"

#include <dlfcn.h>

#include <algorithm>
#include <cstdint>
#include <string>

namespace edgellm::nvinfer_double {

// Libraries stay loaded: their creators may be known elsewhere.
Registry::~Registry() noexcept = default;

nvinfer1::IPluginRegistry::PluginLibraryHandle Registry::loadLibrary(nvinfer1::AsciiChar const* path) noexcept {
  void* handle = dlopen(path, RTLD_NOW | RTLD_LOCAL);
  if (handle == nullptr) {
    reporter_.error(std::string("no plugin library: ") + dlerror());
    return nullptr;
  }
  const auto set_finder = reinterpret_cast<void (*)(nvinfer1::ILoggerFinder*)>(dlsym(handle, "setLoggerFinder"));
  const auto get_creators =
      reinterpret_cast<nvinfer1::IPluginCreatorInterface* const* (*)(int32_t&)>(dlsym(handle, "getCreators"));
  if (set_finder == nullptr || get_creators == nullptr) {
    reporter_.error(std::string(path) + " has no setLoggerFinder or no getCreators");
    (void)dlclose(handle);
    return nullptr;
  }
  set_finder(&finder_);
  int32_t count = 0;
  nvinfer1::IPluginCreatorInterface* const* found = get_creators(count);
  creators_.insert(creators_.end(), found, found + count);
  libraries_.push_back(handle);
  return handle;
}

void Registry::deregisterLibrary(PluginLibraryHandle handle) noexcept {
  if (std::erase(libraries_, handle) == 0) reporter_.error("a plugin library is deregistered that was not loaded");
}

bool Registry::registerCreator(nvinfer1::IPluginCreatorInterface& creator, nvinfer1::AsciiChar const*) noexcept {
  creators_.push_back(&creator);
  return true;
}

nvinfer1::IPluginCreatorInterface* const* Registry::getAllCreators(int32_t* count) const noexcept {
  if (count != nullptr) *count = static_cast<int32_t>(creators_.size());
  return creators_.data();
}

nvinfer1::IPluginCreatorInterface* Registry::getCreator(nvinfer1::AsciiChar const* name, nvinfer1::AsciiChar const*,
                                                        nvinfer1::AsciiChar const*) noexcept {
  reporter_.error(std::string("its registry lists creators, but finds none by name: ") + name);
  return nullptr;
}

bool Registry::deregisterCreator(nvinfer1::IPluginCreatorInterface const& creator) noexcept {
  return std::erase(creators_, &creator) > 0;
}

}  // namespace edgellm::nvinfer_double
