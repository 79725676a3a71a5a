// What the TensorRT source files share: the loaded library's functions, and a logger that keeps what TensorRT says.
#pragma once

#include <NvInferRuntime.h>

#include <cstdint>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include "edgellm/trt_library.hpp"

namespace edgellm {

struct TrtFunctions {
  TrtLibraryInfo info;
  decltype(&createInferRuntime_INTERNAL) create_runtime = nullptr;
};

// The library of these candidates, loaded once; info.reason says why it cannot be used.
const TrtFunctions& tensorrt(const std::vector<std::string>& candidates);

// Keeps messages until they are taken: TensorRT calls it from threads of its own, where Python cannot be called.
class TrtLog : public nvinfer1::ILogger {
 public:
  void log(Severity severity, const char* message) noexcept override;
  std::vector<std::pair<std::string, std::string>> take();
  // The errors since they were last asked for, as the end of a sentence; "TensorRT gave no reason" without any.
  std::string take_errors();

 private:
  static constexpr std::size_t kMostMessages = 256;  // the oldest go first
  std::mutex mutex_;
  std::vector<std::pair<std::string, std::string>> messages_;
  std::vector<std::string> errors_;
};

}  // namespace edgellm
