// Owners of CUDA streams and events.
#pragma once

#include <cuda_runtime_api.h>

#include <utility>

#include "edgellm/cuda_try.hpp"

namespace edgellm {

class Event {
 public:
  // `timing` events cost a little more to record; they are the only ones that elapsed_ms takes.
  explicit Event(bool timing = false) {
    EDGELLM_CUDA_TRY(cudaEventCreateWithFlags(&event_, timing ? cudaEventDefault : cudaEventDisableTiming));
  }
  Event(Event&& other) noexcept : event_(std::exchange(other.event_, nullptr)) {}
  Event& operator=(Event&& other) noexcept {
    std::swap(event_, other.event_);
    return *this;
  }
  Event(const Event&) = delete;
  Event& operator=(const Event&) = delete;
  ~Event() {
    if (event_ != nullptr) EDGELLM_CUDA_WARN(cudaEventDestroy(event_));
  }

  cudaEvent_t get() const noexcept { return event_; }
  void record(cudaStream_t stream) { EDGELLM_CUDA_TRY(cudaEventRecord(event_, stream)); }
  // An error that the device reports here is named with the caller's place, as Stream::wait's is.
  void wait(const char* file = __builtin_FILE(), int line = __builtin_LINE()) const {
    const cudaError_t code = cudaEventSynchronize(event_);
    if (code != cudaSuccess) throw_cuda_error(code, "cudaEventSynchronize", file, line);
  }
  float elapsed_ms(const Event& start) const {
    float ms = 0.0F;
    EDGELLM_CUDA_TRY(cudaEventElapsedTime(&ms, start.event_, event_));
    return ms;
  }

 private:
  cudaEvent_t event_ = nullptr;
};

class Stream {
 public:
  // Non-blocking: independent of the legacy default stream, which other libraries of the process may use.
  Stream() { EDGELLM_CUDA_TRY(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking)); }
  Stream(Stream&& other) noexcept : stream_(std::exchange(other.stream_, nullptr)) {}
  Stream& operator=(Stream&& other) noexcept {
    std::swap(stream_, other.stream_);
    return *this;
  }
  Stream(const Stream&) = delete;
  Stream& operator=(const Stream&) = delete;
  ~Stream() {
    if (stream_ != nullptr) EDGELLM_CUDA_WARN(cudaStreamDestroy(stream_));
  }

  cudaStream_t get() const noexcept { return stream_; }
  void wait(const char* file = __builtin_FILE(), int line = __builtin_LINE()) const {
    const cudaError_t code = cudaStreamSynchronize(stream_);
    if (code != cudaSuccess) throw_cuda_error(code, "cudaStreamSynchronize", file, line);
  }

 private:
  cudaStream_t stream_ = nullptr;
};

}  // namespace edgellm
