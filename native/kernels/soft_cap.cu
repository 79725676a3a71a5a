// Capped logits.
#include <cassert>

#include "device.cuh"
#include "edgellm/kernels/soft_cap.hpp"
#include "launch.hpp"

namespace edgellm::kernels {

namespace {

constexpr int kThreads = 256;

__global__ void __launch_bounds__(kThreads) soft_cap_kernel(float* x, std::size_t count, float cap) {
  start_dependents();
  wait_for_predecessor();
  const std::size_t i = static_cast<std::size_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i < count) x[i] = cap * tanhf(__ldcg(x + i) / cap);
}

}  // namespace

void soft_cap_async(float* x, std::size_t count, float cap, cudaStream_t stream, bool pdl) {
  assert(cap > 0.0f);
  const auto blocks = static_cast<unsigned>((count + kThreads - 1) / kThreads);
  launch(soft_cap_kernel, dim3(blocks), dim3(kThreads), 0, stream, pdl, x, count, cap);
}

}  // namespace edgellm::kernels
