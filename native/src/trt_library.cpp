#include "edgellm/trt_library.hpp"

#ifdef EDGELLM_WITH_TENSORRT

#include <dlfcn.h>

#include <map>

#include "trt_api.hpp"

namespace edgellm {
namespace {

TrtFunctions load(const std::vector<std::string>& candidates) {
  TrtFunctions found;
  void* handle = nullptr;
  std::string failures;
  for (const std::string& candidate : candidates) {
    handle = dlopen(candidate.c_str(), RTLD_NOW | RTLD_LOCAL);
    if (handle != nullptr) {
      found.info.path = candidate;
      break;
    }
    const char* error = dlerror();
    failures +=
        (failures.empty() ? "" : "; ") + std::string(error != nullptr ? error : candidate + " cannot be loaded");
  }
  if (handle == nullptr) {
    found.info.reason = failures.empty() ? "no library was named" : failures;
    return found;
  }
  const auto version = reinterpret_cast<decltype(&getInferLibVersion)>(dlsym(handle, "getInferLibVersion"));
  found.create_runtime =
      reinterpret_cast<decltype(&createInferRuntime_INTERNAL)>(dlsym(handle, "createInferRuntime_INTERNAL"));
  if (version == nullptr || found.create_runtime == nullptr) {
    found.info.reason = found.info.path + " is not TensorRT's runtime: it has no " +
                        (version == nullptr ? "getInferLibVersion" : "createInferRuntime_INTERNAL");
    found.create_runtime = nullptr;
    return found;
  }
  const int number = version();  // 101401 is 10.14.1
  found.info.version = {number / 10000, number / 100 % 100, number % 100};
  // Not in every library that these headers can use, nor in every header.
  const auto build = reinterpret_cast<std::int32_t (*)()>(dlsym(handle, "getInferLibBuildVersion"));
  if (build != nullptr) found.info.version.push_back(build());
  if (found.info.version[0] != NV_TENSORRT_MAJOR) {
    found.info.reason = found.info.path + " is TensorRT " + std::to_string(found.info.version[0]) +
                        ", the native module was compiled for " + std::to_string(NV_TENSORRT_MAJOR) +
                        ": build it again beside this TensorRT";
    found.create_runtime = nullptr;
  }
  return found;
}

const char* name_of(nvinfer1::ILogger::Severity severity) {
  switch (severity) {
    case nvinfer1::ILogger::Severity::kINTERNAL_ERROR:
    case nvinfer1::ILogger::Severity::kERROR:
      return "error";
    case nvinfer1::ILogger::Severity::kWARNING:
      return "warning";
    default:
      return "info";
  }
}

}  // namespace

bool built_with_tensorrt() noexcept { return true; }

std::string tensorrt_header_version() {
  return std::to_string(NV_TENSORRT_MAJOR) + "." + std::to_string(NV_TENSORRT_MINOR);
}

const TrtFunctions& tensorrt(const std::vector<std::string>& candidates) {
  static std::mutex mutex;
  static std::map<std::vector<std::string>, TrtFunctions> loaded;  // never unloaded: it keeps state of its own
  const std::lock_guard lock(mutex);
  const auto known = loaded.find(candidates);
  return known != loaded.end() ? known->second : loaded.emplace(candidates, load(candidates)).first->second;
}

TrtLibraryInfo find_tensorrt(const std::vector<std::string>& candidates) { return tensorrt(candidates).info; }

void TrtLog::log(Severity severity, const char* message) noexcept {
  if (severity == Severity::kVERBOSE || message == nullptr) return;
  try {
    const std::lock_guard lock(mutex_);
    if (messages_.size() == kMostMessages) messages_.erase(messages_.begin());
    messages_.emplace_back(name_of(severity), message);
    const bool is_error = severity == Severity::kERROR || severity == Severity::kINTERNAL_ERROR;
    if (is_error && errors_.size() < kMostMessages) errors_.emplace_back(message);
  } catch (...) {  // no memory for a message: TensorRT's own call must still return
  }
}

std::vector<std::pair<std::string, std::string>> TrtLog::take() {
  const std::lock_guard lock(mutex_);
  return std::exchange(messages_, {});
}

std::string TrtLog::take_errors() {
  const std::lock_guard lock(mutex_);
  std::string text;
  for (const std::string& error : errors_) text += (text.empty() ? "" : "; ") + error;
  errors_.clear();
  return text.empty() ? "TensorRT gave no reason" : text;
}

}  // namespace edgellm

#else

namespace edgellm {

bool built_with_tensorrt() noexcept { return false; }

std::string tensorrt_header_version() { return ""; }

TrtLibraryInfo find_tensorrt(const std::vector<std::string>&) {
  return {"", {}, "the native module was compiled without NvInfer.h; build it again beside TensorRT (JetPack has it)"};
}

}  // namespace edgellm

#endif
