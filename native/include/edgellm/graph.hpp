// A captured, replayable sequence of kernels.
#pragma once

#include <cuda_runtime_api.h>

#include <utility>

#include "edgellm/cuda_try.hpp"

namespace edgellm {

class Graph {
 public:
  Graph() = default;
  // Captures what `record` launches on `stream`. Nothing runs yet. Throws what `record` throws.
  template <typename Record>
  Graph(cudaStream_t stream, Record&& record) {
    EDGELLM_CUDA_TRY(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
    cudaGraph_t captured = nullptr;
    try {
      record();
    } catch (...) {
      (void)cudaStreamEndCapture(stream, &captured);  // the stream must leave capture mode; `record`'s error is thrown
      if (captured != nullptr) (void)cudaGraphDestroy(captured);
      (void)cudaGetLastError();
      throw;
    }
    EDGELLM_CUDA_TRY(cudaStreamEndCapture(stream, &captured));
    const cudaError_t code = cudaGraphInstantiate(&executable_, captured, 0);
    EDGELLM_CUDA_WARN(cudaGraphDestroy(captured));
    if (code != cudaSuccess) throw_cuda_error(code, "cudaGraphInstantiate", __FILE__, __LINE__);
    // Uploading now moves its cost, and the memory it takes, out of the first replay.
    const cudaError_t upload = cudaGraphUpload(executable_, stream);
    if (upload != cudaSuccess) {
      EDGELLM_CUDA_WARN(cudaGraphExecDestroy(executable_));
      throw_cuda_error(upload, "cudaGraphUpload", __FILE__, __LINE__);
    }
  }
  Graph(Graph&& other) noexcept : executable_(std::exchange(other.executable_, nullptr)) {}
  Graph& operator=(Graph&& other) noexcept {
    std::swap(executable_, other.executable_);
    return *this;
  }
  Graph(const Graph&) = delete;
  Graph& operator=(const Graph&) = delete;
  ~Graph() {
    if (executable_ != nullptr) EDGELLM_CUDA_WARN(cudaGraphExecDestroy(executable_));
  }

  explicit operator bool() const noexcept { return executable_ != nullptr; }
  void launch(cudaStream_t stream) const { EDGELLM_CUDA_TRY(cudaGraphLaunch(executable_, stream)); }

 private:
  cudaGraphExec_t executable_ = nullptr;
};

}  // namespace edgellm
