#include "edgellm/trt_engine.hpp"

#ifdef EDGELLM_WITH_TENSORRT

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>

#include "edgellm/cuda_try.hpp"
#include "trt_api.hpp"

namespace edgellm {
namespace {

// A file in memory, read as it is used.
class MappedFile {
 public:
  explicit MappedFile(const std::string& path) {
    const int file = open(path.c_str(), O_RDONLY | O_CLOEXEC);
    if (file < 0) throw TrtError(path + " cannot be opened: " + std::strerror(errno));
    struct stat facts{};
    if (fstat(file, &facts) == 0 && facts.st_size > 0) {
      size_ = static_cast<std::size_t>(facts.st_size);
      data_ = mmap(nullptr, size_, PROT_READ, MAP_PRIVATE, file, 0);
    }
    const int error = errno;
    close(file);
    if (size_ == 0) throw TrtError(path + " is empty; build the engine again with --force");
    if (data_ == MAP_FAILED) throw TrtError(path + " cannot be mapped: " + std::strerror(error));
  }
  MappedFile(const MappedFile&) = delete;
  MappedFile& operator=(const MappedFile&) = delete;
  ~MappedFile() { munmap(data_, size_); }

  const void* data() const noexcept { return data_; }
  std::size_t size() const noexcept { return size_; }

 private:
  void* data_ = nullptr;
  std::size_t size_ = 0;
};

std::string dtype_name(nvinfer1::DataType type) {
  switch (type) {
    case nvinfer1::DataType::kFLOAT:
      return "float32";
    case nvinfer1::DataType::kHALF:
      return "float16";
    case nvinfer1::DataType::kBF16:
      return "bfloat16";
    case nvinfer1::DataType::kINT64:
      return "int64";
    case nvinfer1::DataType::kINT32:
      return "int32";
    case nvinfer1::DataType::kINT8:
      return "int8";
    case nvinfer1::DataType::kUINT8:
      return "uint8";
    case nvinfer1::DataType::kBOOL:
      return "bool";
    case nvinfer1::DataType::kFP8:
      return "fp8";
    case nvinfer1::DataType::kINT4:
      return "int4";
    default:
      return "dtype " + std::to_string(static_cast<int>(type));
  }
}

std::vector<std::int64_t> dims_of(const nvinfer1::Dims& dims) { return {dims.d, dims.d + std::max(dims.nbDims, 0)}; }

// Throws the reason why createInferRuntime must not be called: without a driver it returns garbage instead of null.
void require_device() {
  int count = 0;
  const cudaError_t code = cudaGetDeviceCount(&count);
  if (code == cudaSuccess && count > 0) return;
  (void)cudaGetLastError();
  throw TrtError(std::string("TensorRT needs an NVIDIA GPU and its driver: ") +
                 (code == cudaSuccess ? "CUDA sees no device" : cudaGetErrorString(code)));
}

}  // namespace

struct TrtContext::State {
  std::unique_ptr<nvinfer1::IExecutionContext> context;
  TrtLog* log = nullptr;

  void check(bool done, const std::string& what) const {
    if (done) return;
    (void)cudaGetLastError();
    throw CudaError(cudaErrorUnknown, "TensorRT: " + what + " failed: " + log->take_errors());
  }
};

TrtContext::TrtContext(std::unique_ptr<State> state) : state_(std::move(state)) {}
TrtContext::~TrtContext() = default;
TrtContext::TrtContext(TrtContext&&) noexcept = default;
TrtContext& TrtContext::operator=(TrtContext&&) noexcept = default;

void TrtContext::use_profile_async(int profile, cudaStream_t stream) {
  if (state_->context->getOptimizationProfile() == profile) return;
  state_->check(state_->context->setOptimizationProfileAsync(profile, stream),
                "switching to profile " + std::to_string(profile));
}

void TrtContext::set_shape(const std::string& name, std::span<const std::int64_t> dims) {
  nvinfer1::Dims shape{};
  if (dims.size() > static_cast<std::size_t>(nvinfer1::Dims::MAX_DIMS)) {
    throw std::logic_error(name + " has more than " + std::to_string(nvinfer1::Dims::MAX_DIMS) + " dimensions");
  }
  shape.nbDims = static_cast<std::int32_t>(dims.size());
  std::copy(dims.begin(), dims.end(), shape.d);
  std::string text;
  for (const std::int64_t size : dims) text += (text.empty() ? "" : ", ") + std::to_string(size);
  state_->check(state_->context->setInputShape(name.c_str(), shape), "giving " + name + " the shape [" + text + "]");
}

void TrtContext::set_address(const std::string& name, void* data) {
  state_->check(state_->context->setTensorAddress(name.c_str(), data), "binding " + name);
}

void TrtContext::enqueue_async(cudaStream_t stream) {
  if (!state_->context->allInputDimensionsSpecified()) throw std::logic_error("an input of the engine has no shape");
  state_->check(state_->context->enqueueV3(stream), "enqueueV3");
}

struct TrtEngine::State {
  TrtLog log;  // first: TensorRT logs until its last object is gone
  TrtLibraryInfo library;
  std::unique_ptr<nvinfer1::IRuntime> runtime;
  std::unique_ptr<nvinfer1::ICudaEngine> engine;
  std::vector<TrtBinding> bindings;
  int num_profiles = 0;
  std::size_t context_bytes = 0;

  TrtBinding binding(const char* name) const {
    TrtBinding found;
    found.name = name;
    found.is_input = engine->getTensorIOMode(name) == nvinfer1::TensorIOMode::kINPUT;
    found.dtype = dtype_name(engine->getTensorDataType(name));
    found.dims = dims_of(engine->getTensorShape(name));
    found.on_host = engine->getTensorLocation(name) == nvinfer1::TensorLocation::kHOST;
    found.is_linear = engine->getTensorFormat(name) == nvinfer1::TensorFormat::kLINEAR;
    for (int profile = 0; found.is_input && profile < num_profiles; ++profile) {
      found.profiles.push_back({dims_of(engine->getProfileShape(name, profile, nvinfer1::OptProfileSelector::kMIN)),
                                dims_of(engine->getProfileShape(name, profile, nvinfer1::OptProfileSelector::kOPT)),
                                dims_of(engine->getProfileShape(name, profile, nvinfer1::OptProfileSelector::kMAX))});
    }
    return found;
  }
};

TrtEngine::TrtEngine(const std::string& path, const std::vector<std::string>& candidates, const std::string& plugins)
    : state_(std::make_unique<State>()) {
  const TrtFunctions& functions = tensorrt(candidates);
  state_->library = functions.info;
  if (functions.create_runtime == nullptr) throw TrtError("no TensorRT: " + functions.info.reason);
  require_device();
  const MappedFile plan(path);
  state_->runtime.reset(static_cast<nvinfer1::IRuntime*>(functions.create_runtime(&state_->log, NV_TENSORRT_VERSION)));
  if (state_->runtime == nullptr) throw TrtError("TensorRT made no runtime: " + state_->log.take_errors());
  if (!plugins.empty() && state_->runtime->getPluginRegistry().loadLibrary(plugins.c_str()) == nullptr) {
    throw TrtError("TensorRT does not load " + plugins + ": " + state_->log.take_errors());
  }
  state_->engine.reset(state_->runtime->deserializeCudaEngine(plan.data(), plan.size()));
  if (state_->engine == nullptr) {
    (void)cudaGetLastError();
    throw TrtError("TensorRT refuses " + path + ": " + state_->log.take_errors() +
                   "; build it again on this machine with `edgellm build --force`");
  }
  const nvinfer1::ICudaEngine& engine = *state_->engine;
  if (engine.isRefittable()) {
    throw TrtError(path + " was built with refittable weights, which this runtime does not refit; build it without");
  }
  state_->num_profiles = engine.getNbOptimizationProfiles();
  for (int profile = 0; profile < state_->num_profiles; ++profile) {
    const std::int64_t size = engine.getDeviceMemorySizeForProfileV2(profile);
    state_->context_bytes = std::max(state_->context_bytes, static_cast<std::size_t>(std::max<std::int64_t>(size, 0)));
  }
  for (int i = 0; i < engine.getNbIOTensors(); ++i) {
    state_->bindings.push_back(state_->binding(engine.getIOTensorName(i)));
  }
}

TrtEngine::~TrtEngine() = default;

const TrtLibraryInfo& TrtEngine::library() const noexcept { return state_->library; }
const std::vector<TrtBinding>& TrtEngine::bindings() const noexcept { return state_->bindings; }
int TrtEngine::num_profiles() const noexcept { return state_->num_profiles; }
std::size_t TrtEngine::context_bytes() const noexcept { return state_->context_bytes; }

std::vector<std::pair<std::string, std::string>> TrtEngine::take_log() { return state_->log.take(); }

TrtContext TrtEngine::make_context(std::byte* memory) {
  auto state = std::make_unique<TrtContext::State>();
  state->log = &state_->log;
  state->context.reset(
      state_->engine->createExecutionContext(nvinfer1::ExecutionContextAllocationStrategy::kUSER_MANAGED));
  state->check(state->context != nullptr, "creating an execution context");
  state->context->setDeviceMemoryV2(memory, static_cast<std::int64_t>(state_->context_bytes));
  return TrtContext(std::move(state));
}

}  // namespace edgellm

#else

namespace edgellm {

struct TrtContext::State {};
struct TrtEngine::State {
  TrtLibraryInfo library;
  std::vector<TrtBinding> bindings;
};

TrtContext::TrtContext(std::unique_ptr<State> state) : state_(std::move(state)) {}
TrtContext::~TrtContext() = default;
TrtContext::TrtContext(TrtContext&&) noexcept = default;
TrtContext& TrtContext::operator=(TrtContext&&) noexcept = default;

// Never called: no engine can be made.
void TrtContext::use_profile_async(int, cudaStream_t) {}
void TrtContext::set_shape(const std::string&, std::span<const std::int64_t>) {}
void TrtContext::set_address(const std::string&, void*) {}
void TrtContext::enqueue_async(cudaStream_t) {}

TrtEngine::TrtEngine(const std::string&, const std::vector<std::string>& candidates, const std::string&) {
  throw TrtError("no TensorRT: " + find_tensorrt(candidates).reason);
}
TrtEngine::~TrtEngine() = default;
const TrtLibraryInfo& TrtEngine::library() const noexcept { return state_->library; }
const std::vector<TrtBinding>& TrtEngine::bindings() const noexcept { return state_->bindings; }
int TrtEngine::num_profiles() const noexcept { return 0; }
std::size_t TrtEngine::context_bytes() const noexcept { return 0; }
std::vector<std::pair<std::string, std::string>> TrtEngine::take_log() { return {}; }
TrtContext TrtEngine::make_context(std::byte*) { return TrtContext(nullptr); }

}  // namespace edgellm

#endif
