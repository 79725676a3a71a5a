// How the double tells of errors: through the caller's logger and error recorder, as TensorRT does.
#pragma once

#include <NvInferRuntime.h>

#include <string>

namespace edgellm::nvinfer_double {

class Reporter {
 public:
  explicit Reporter(nvinfer1::ILogger& logger) : logger_(&logger) {}
  Reporter(const Reporter& other) : Reporter(*other.logger_) {}  // a recorder belongs to one object
  Reporter& operator=(const Reporter&) = delete;
  ~Reporter() { set_recorder(nullptr); }

  // Every message begins with "nvinfer double: ".
  void error(const std::string& message,
             nvinfer1::ErrorCode code = nvinfer1::ErrorCode::kINVALID_ARGUMENT) const noexcept;
  // For what the double does not have; returns false.
  bool lacks(const char* what) const noexcept;
  void info(const std::string& message) const noexcept;
  // An error that is printed to stderr as well: whoever deletes in the wrong order may not read its log any more.
  void wrong_order(const std::string& message) const noexcept;

  nvinfer1::ILogger& logger() const noexcept { return *logger_; }
  nvinfer1::IErrorRecorder* recorder() const noexcept { return recorder_; }
  void set_recorder(nvinfer1::IErrorRecorder* recorder) noexcept;

 private:
  nvinfer1::ILogger* logger_;
  nvinfer1::IErrorRecorder* recorder_ = nullptr;
};

}  // namespace edgellm::nvinfer_double
