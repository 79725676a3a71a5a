// Drives a library with libnvinfer's interface by TensorRT's own headers: what a test writes, line by line, is called.
//
//   nvinfer_double_driver LIBRARY PLAN < SCRIPT
//
// A line is a call and its arguments; its result is a line of output, after a line "log TEXT" for everything that was
// logged meanwhile. Nothing here knows that the library may be a double.
#include <NvInferRuntime.h>
#include <cuda_runtime_api.h>
#include <dlfcn.h>

#include <cstdint>
#include <cstdio>
#include <fstream>
#include <functional>
#include <iostream>
#include <iterator>
#include <map>
#include <memory>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

namespace {

class Logger final : public nvinfer1::ILogger {
 public:
  void log(Severity severity, const char* text) noexcept override {
    if (severity != Severity::kVERBOSE) std::printf("log %s\n", text);
  }
};

void cuda(cudaError_t code) {
  if (code == cudaSuccess) return;
  (void)cudaGetLastError();
  throw std::runtime_error(std::string("cuda ") + cudaGetErrorName(code));
}

std::string text_of(const nvinfer1::Dims& dims) {
  if (dims.nbDims < 0) return "none";
  std::ostringstream text;
  for (int i = 0; i < dims.nbDims; ++i) text << (i > 0 ? "," : "[") << dims.d[i];
  text << (dims.nbDims > 0 ? "]" : "[]");
  return text.str();
}

nvinfer1::Dims read_dims(std::istream& line) {
  nvinfer1::Dims dims{};
  while (dims.nbDims < nvinfer1::Dims::MAX_DIMS && line >> dims.d[dims.nbDims]) ++dims.nbDims;
  return dims;
}

std::vector<char> read_file(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  if (!file) throw std::runtime_error("cannot read " + path);
  return {std::istreambuf_iterator<char>(file), {}};
}

template <class T>
T next(std::istream& line) {
  T value{};
  if (!(line >> value)) throw std::runtime_error("an argument is missing");
  return value;
}

struct Buffer {
  void* data = nullptr;
  std::size_t size = 0;
};

class Driver {
 public:
  Driver(const std::string& library, const std::string& plan) {
    void* handle = dlopen(library.c_str(), RTLD_NOW | RTLD_LOCAL);
    if (handle == nullptr) throw std::runtime_error(dlerror());
    const auto version = reinterpret_cast<decltype(&getInferLibVersion)>(dlsym(handle, "getInferLibVersion"));
    const auto create =
        reinterpret_cast<decltype(&createInferRuntime_INTERNAL)>(dlsym(handle, "createInferRuntime_INTERNAL"));
    if (version == nullptr || create == nullptr) throw std::runtime_error("the library has not libnvinfer's functions");
    std::printf("version %d\n", version());
    runtime_.reset(static_cast<nvinfer1::IRuntime*>(create(&logger_, NV_TENSORRT_VERSION)));
    if (runtime_ == nullptr) throw std::runtime_error("no runtime");
    {
      const std::vector<char> bytes = read_file(plan);  // freed before the engine is used
      engine_.reset(runtime_->deserializeCudaEngine(bytes.data(), bytes.size()));
    }
    std::printf("engine %s\n", engine_ != nullptr ? "made" : "refused");
    if (cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking) != cudaSuccess) (void)cudaGetLastError();
  }
  Driver(const Driver&) = delete;
  Driver& operator=(const Driver&) = delete;
  ~Driver() {
    if (graph_ != nullptr) (void)cudaGraphExecDestroy(graph_);
    for (auto& [name, buffer] : buffers_) (void)cudaFree(buffer.data);
    if (stream_ != nullptr) (void)cudaStreamDestroy(stream_);
  }

  bool has_engine() const { return engine_ != nullptr; }

  std::string call(const std::string& what, std::istream& line) {
    const auto found = calls_.find(what);
    if (found == calls_.end()) throw std::runtime_error("no call " + what);
    return found->second(line);
  }

 private:
  using Call = std::function<std::string(std::istream&)>;

  static std::string answer(bool done) { return done ? "true" : "false"; }
  nvinfer1::IExecutionContext& context() {
    if (context_ == nullptr) throw std::runtime_error("no context");
    return *context_;
  }
  Buffer& buffer(const std::string& name) {
    const auto found = buffers_.find(name);
    if (found == buffers_.end()) throw std::runtime_error("no buffer " + name);
    return found->second;
  }

  std::string describe() {
    std::ostringstream text;
    const nvinfer1::ICudaEngine& engine = *engine_;
    text << engine.getNbIOTensors() << " tensors, " << engine.getNbOptimizationProfiles() << " profiles, refittable "
         << engine.isRefittable();
    for (int i = 0; i < engine.getNbIOTensors(); ++i) {
      const char* name = engine.getIOTensorName(i);
      const bool is_input = engine.getTensorIOMode(name) == nvinfer1::TensorIOMode::kINPUT;
      text << " ; tensor " << name << (is_input ? " input " : " output ")
           << static_cast<int>(engine.getTensorDataType(name)) << " " << text_of(engine.getTensorShape(name));
      for (int p = 0; is_input && p < engine.getNbOptimizationProfiles(); ++p) {
        for (const auto select : {nvinfer1::OptProfileSelector::kMIN, nvinfer1::OptProfileSelector::kOPT,
                                  nvinfer1::OptProfileSelector::kMAX}) {
          text << " " << text_of(engine.getProfileShape(name, p, select));
        }
      }
    }
    for (int p = 0; p < engine.getNbOptimizationProfiles(); ++p) {
      text << " ; memory " << engine.getDeviceMemorySizeForProfileV2(p);
    }
    return text.str();
  }

  Logger logger_;
  std::unique_ptr<nvinfer1::IRuntime> runtime_;
  std::unique_ptr<nvinfer1::ICudaEngine> engine_;
  std::unique_ptr<nvinfer1::IExecutionContext> context_;
  cudaStream_t stream_ = nullptr;
  cudaGraphExec_t graph_ = nullptr;
  std::map<std::string, Buffer> buffers_;

  const std::map<std::string, Call> calls_ = {
      {"describe", [this](std::istream&) { return describe(); }},
      // How many plugin creators a library has.
      {"plugins",
       [this](std::istream& line) {
         nvinfer1::IPluginRegistry& registry = runtime_->getPluginRegistry();
         if (registry.loadLibrary(next<std::string>(line).c_str()) == nullptr) return answer(false);
         int count = 0;
         (void)registry.getAllCreators(&count);
         return std::to_string(count);
       }},
      {"create",
       [this](std::istream&) {
         context_.reset(engine_->createExecutionContext(nvinfer1::ExecutionContextAllocationStrategy::kUSER_MANAGED));
         return answer(context_ != nullptr);
       }},
      {"profile",
       [this](std::istream& line) { return answer(context().setOptimizationProfileAsync(next<int>(line), stream_)); }},
      {"which_profile", [this](std::istream&) { return std::to_string(context().getOptimizationProfile()); }},
      {"shape",
       [this](std::istream& line) {
         const auto name = next<std::string>(line);
         return answer(context().setInputShape(name.c_str(), read_dims(line)));
       }},
      {"shape_of",
       [this](std::istream& line) { return text_of(context().getTensorShape(next<std::string>(line).c_str())); }},
      {"most_bytes",
       [this](std::istream& line) {
         return std::to_string(context().getMaxOutputSize(next<std::string>(line).c_str()));
       }},
      // An address that is never used: for calls that only look at it.
      {"address",
       [this](std::istream& line) {
         const auto name = next<std::string>(line);
         return answer(context().setTensorAddress(name.c_str(), reinterpret_cast<void*>(next<std::uintptr_t>(line))));
       }},
      {"missing",
       [this](std::istream&) {
         std::vector<const char*> names(static_cast<std::size_t>(engine_->getNbIOTensors()));
         const int count = context().inferShapes(static_cast<int>(names.size()), names.data());
         std::string text = std::to_string(count);
         for (int i = 0; i < count; ++i) text += std::string(" ") + names[static_cast<std::size_t>(i)];
         return text;
       }},
      {"alloc",
       [this](std::istream& line) {
         Buffer& buffer = buffers_[next<std::string>(line)];
         buffer.size = next<std::size_t>(line);
         cuda(cudaMalloc(&buffer.data, buffer.size));
         cuda(cudaMemsetAsync(buffer.data, 0, buffer.size, stream_));  // cudaMemset is on another stream
         return answer(true);
       }},
      // TENSOR BUFFER, with an offset in bytes.
      {"bind",
       [this](std::istream& line) {
         const auto name = next<std::string>(line);
         const Buffer& to = buffer(next<std::string>(line));
         return answer(context().setTensorAddress(name.c_str(), static_cast<char*>(to.data) + next<std::size_t>(line)));
       }},
      {"memory",
       [this](std::istream& line) {
         const Buffer& of = buffer(next<std::string>(line));
         context().setDeviceMemoryV2(of.data, static_cast<std::int64_t>(of.size));
         return answer(true);
       }},
      {"upload",
       [this](std::istream& line) {
         const Buffer& to = buffer(next<std::string>(line));
         const std::vector<char> bytes = read_file(next<std::string>(line));
         if (bytes.size() > to.size) throw std::runtime_error("the file is larger than the buffer");
         cuda(cudaMemcpyAsync(to.data, bytes.data(), bytes.size(), cudaMemcpyHostToDevice, stream_));
         cuda(cudaStreamSynchronize(stream_));
         return answer(true);
       }},
      {"download",
       [this](std::istream& line) {
         const Buffer& from = buffer(next<std::string>(line));
         std::vector<char> bytes(from.size);
         std::ofstream file(next<std::string>(line), std::ios::binary);
         cuda(cudaMemcpyAsync(bytes.data(), from.data, bytes.size(), cudaMemcpyDeviceToHost, stream_));
         cuda(cudaStreamSynchronize(stream_));
         file.write(bytes.data(), static_cast<std::streamsize>(bytes.size()));
         return answer(bool(file));
       }},
      {"enqueue", [this](std::istream&) { return answer(context().enqueueV3(stream_)); }},
      {"sync",
       [this](std::istream&) {
         cuda(cudaStreamSynchronize(stream_));
         return answer(true);
       }},
      // One enqueue, captured; "replay" launches what was captured last.
      {"capture",
       [this](std::istream&) {
         cudaGraph_t captured = nullptr;
         cuda(cudaStreamBeginCapture(stream_, cudaStreamCaptureModeThreadLocal));
         const bool done = context().enqueueV3(stream_);
         cuda(cudaStreamEndCapture(stream_, &captured));
         if (done) {
           if (graph_ != nullptr) cuda(cudaGraphExecDestroy(graph_));
           cuda(cudaGraphInstantiate(&graph_, captured, 0));
         }
         cuda(cudaGraphDestroy(captured));
         return answer(done);
       }},
      {"replay",
       [this](std::istream&) {
         cuda(cudaGraphLaunch(graph_, stream_));
         cuda(cudaStreamSynchronize(stream_));
         return answer(true);
       }},
      {"free_bytes",
       [](std::istream&) {
         std::size_t free = 0;
         std::size_t total = 0;
         cuda(cudaMemGetInfo(&free, &total));
         return std::to_string(free);
       }},
      // Out of order: the engine before its context, which must be noticed.
      {"delete_engine",
       [this](std::istream&) {
         engine_.reset();
         (void)context_.release();
         return answer(true);
       }},
  };
};

}  // namespace

int main(int count, char** arguments) {
  if (count != 3) {
    std::fprintf(stderr, "usage: nvinfer_double_driver LIBRARY PLAN < SCRIPT\n");
    return 2;
  }
  try {
    Driver driver(arguments[1], arguments[2]);
    std::fflush(stdout);
    std::string text;
    while (driver.has_engine() && std::getline(std::cin, text)) {
      std::istringstream line(text);
      std::string what;
      line >> what;
      std::string result;
      try {
        result = driver.call(what, line);
      } catch (const std::exception& error) {
        result = std::string("error ") + error.what();
      }
      std::printf("%s\n", result.c_str());
      std::fflush(stdout);
    }
    std::fflush(stdout);
  } catch (const std::exception& error) {
    std::printf("error %s\n", error.what());
    return 1;
  }
  return 0;
}
