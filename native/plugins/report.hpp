// Where the plugins' errors go: TensorRT's logger if there is one, else stderr. No exception crosses TensorRT's
// interface.
#pragma once

#include <NvInferRuntime.h>

#include <exception>
#include <string>

namespace edgellm::plugins {

void set_logger(nvinfer1::ILogger* logger);
void set_logger_finder(nvinfer1::ILoggerFinder* finder);
void report_error(const std::string& message) noexcept;

// What `work` returns, or `failed` after an exception, whose text is reported as that of `plugin`.
template <class Result, class Work>
Result guarded(const char* plugin, Result failed, Work&& work) noexcept {
  try {
    return work();
  } catch (const std::exception& error) {
    report_error(std::string(plugin) + ": " + error.what());
  } catch (...) {
    report_error(std::string(plugin) + ": unknown exception");
  }
  return failed;
}

}  // namespace edgellm::plugins
