#include "reporter.hpp"

#include <cstdio>
#include <utility>

namespace edgellm::nvinfer_double {

void Reporter::error(const std::string& message, nvinfer1::ErrorCode code) const noexcept {
  const std::string text = "nvinfer double: " + message;
  if (recorder_ != nullptr) recorder_->reportError(code, text.c_str());
  logger_->log(nvinfer1::ILogger::Severity::kERROR, text.c_str());
}

bool Reporter::lacks(const char* what) const noexcept {
  error(std::string("it has no ") + what, nvinfer1::ErrorCode::kINVALID_STATE);
  return false;
}

void Reporter::info(const std::string& message) const noexcept {
  logger_->log(nvinfer1::ILogger::Severity::kINFO, ("nvinfer double: " + message).c_str());
}

void Reporter::wrong_order(const std::string& message) const noexcept {
  std::fprintf(stderr, "nvinfer double: %s\n", message.c_str());
  error(message, nvinfer1::ErrorCode::kINVALID_STATE);
}

void Reporter::set_recorder(nvinfer1::IErrorRecorder* recorder) noexcept {
  if (recorder != nullptr) recorder->incRefCount();
  if (nvinfer1::IErrorRecorder* old = std::exchange(recorder_, recorder); old != nullptr) old->decRefCount();
}

}  // namespace edgellm::nvinfer_double
