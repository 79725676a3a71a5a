#include "report.hpp"

#include <atomic>
#include <cstdio>

namespace edgellm::plugins {
namespace {

std::atomic<nvinfer1::ILogger*> the_logger{nullptr};
std::atomic<nvinfer1::ILoggerFinder*> the_finder{nullptr};

}  // namespace

void set_logger(nvinfer1::ILogger* logger) { the_logger = logger; }
void set_logger_finder(nvinfer1::ILoggerFinder* finder) { the_finder = finder; }

void report_error(const std::string& message) noexcept {
  nvinfer1::ILogger* logger = the_logger;
  if (nvinfer1::ILoggerFinder* finder = the_finder) {
    try {
      if (nvinfer1::ILogger* found = finder->findLogger()) logger = found;
    } catch (...) {  // then the other logger, or stderr
    }
  }
  if (logger) {
    logger->log(nvinfer1::ILogger::Severity::kERROR, message.c_str());
  } else {
    std::fprintf(stderr, "edgellm plugins: %s\n", message.c_str());
  }
}

}  // namespace edgellm::plugins
