// A TensorRT engine and its execution contexts, as the rest of the module sees them: no name of NvInfer.h is in here.
#pragma once

#include <cuda_runtime_api.h>

#include <array>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "edgellm/trt_library.hpp"

namespace edgellm {

// TensorRT is missing, or refused something before anything ran. Python sees edgellm_ros.errors.UnsupportedError.
class TrtError : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

// What an engine says of one of its inputs or outputs.
struct TrtBinding {
  std::string name;
  bool is_input = false;
  std::string dtype;               // float16, bfloat16, float32, int64, int32, int8, uint8, bool, fp8, int4, fp4
  std::vector<std::int64_t> dims;  // -1 varies
  bool on_host = false;            // TensorRT wants its values in host memory
  bool is_linear = true;           // row-major, as everything that we bind is
  // Smallest, best and largest shape in each profile; inputs only.
  std::vector<std::array<std::vector<std::int64_t>, 3>> profiles;
};

// One IExecutionContext on memory that its user manages. Not thread-safe. Every call that TensorRT answers with false
// throws CudaError with what TensorRT logged: the state of the device is not known then.
class TrtContext {
 public:
  ~TrtContext();
  TrtContext(TrtContext&&) noexcept;
  TrtContext& operator=(TrtContext&&) noexcept;

  // Enqueues copies on `stream`, on which enqueue_async must follow. Shapes are to be set again.
  void use_profile_async(int profile, cudaStream_t stream);
  void set_shape(const std::string& name, std::span<const std::int64_t> dims);
  // 256-byte aligned device memory that outlives every step that was enqueued with it.
  void set_address(const std::string& name, void* data);
  // Throws std::logic_error when an input has no shape yet.
  void enqueue_async(cudaStream_t stream);

 private:
  friend class TrtEngine;
  struct State;
  explicit TrtContext(std::unique_ptr<State> state);
  std::unique_ptr<State> state_;
};

// A deserialised engine. Its weights, and nothing else, are in device memory.
class TrtEngine {
 public:
  // path: of the plan file. candidates: as find_tensorrt takes them. plugins: of the library that the plan needs, or
  // empty. Throws TrtError without TensorRT, without a CUDA
  // driver or GPU (createInferRuntime would return a pointer to nothing), and with what TensorRT logged when it refuses
  // the plan; also for an engine that can be refitted, which nothing here does.
  TrtEngine(const std::string& path, const std::vector<std::string>& candidates, const std::string& plugins = "");
  ~TrtEngine();
  TrtEngine(const TrtEngine&) = delete;
  TrtEngine& operator=(const TrtEngine&) = delete;

  const TrtLibraryInfo& library() const noexcept;
  const std::vector<TrtBinding>& bindings() const noexcept;
  int num_profiles() const noexcept;
  // Scratch memory that a context needs with the profile that needs most.
  std::size_t context_bytes() const noexcept;
  // (severity, text) of what TensorRT has logged since the last call.
  std::vector<std::pair<std::string, std::string>> take_log();

  // A context on `memory` of context_bytes(), 256-byte aligned. Contexts may share it if one stream runs them all: what
  // is in it does not outlive a step. The engine must outlive the context.
  TrtContext make_context(std::byte* memory);

 private:
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace edgellm
