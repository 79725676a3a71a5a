// Linked with TensorRT's real runtime library: says its version, why it cannot be used, or how it refuses a plan.
#include <NvInferRuntime.h>
#include <cuda_runtime_api.h>

#include <cstdio>
#include <memory>

namespace {

class Logger : public nvinfer1::ILogger {
  void log(Severity severity, const char* message) noexcept override {
    if (severity <= Severity::kERROR) std::printf("error: %s\n", message);
  }
};

}  // namespace

int main() {
  std::printf("version: %d\n", getInferLibVersion());
  int count = 0;
  const cudaError_t code = cudaGetDeviceCount(&count);
  if (code != cudaSuccess || count == 0) {  // createInferRuntime would return garbage
    std::printf("no device: %s\n", cudaGetErrorString(code));
    return 2;
  }
  Logger logger;
  const std::unique_ptr<nvinfer1::IRuntime> runtime(nvinfer1::createInferRuntime(logger));
  if (runtime == nullptr) return 3;
  static const char plan[] = "this is no plan of TensorRT, and long enough to be asked for a header";
  const std::unique_ptr<nvinfer1::ICudaEngine> engine(runtime->deserializeCudaEngine(plan, sizeof(plan)));
  std::printf("engine: %s\n", engine == nullptr ? "refused" : "accepted");
  return engine == nullptr ? 0 : 4;
}
