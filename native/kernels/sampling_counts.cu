// Which tokens a sequence has, for its penalties: marked from a list of ids when it starts.
#include "device.cuh"
#include "edgellm/kernels/sampling.hpp"
#include "launch.hpp"

namespace edgellm::kernels {

namespace {

constexpr int kThreads = 256;

__global__ void __launch_bounds__(kThreads)
    count_tokens_kernel(const int32_t* ids, int num_prompt, int num_ids, uint32_t* counts) {
  start_dependents();
  wait_for_predecessor();
  const int i = blockIdx.x * kThreads + threadIdx.x;
  if (i >= num_ids) return;
  if (i < num_prompt) {
    atomicOr(counts + ids[i], 0x80000000u);
  } else {
    atomicAdd(counts + ids[i], 1u);
  }
}

}  // namespace

void count_tokens_async(const int32_t* ids, int num_prompt, int num_answer, uint32_t* counts, cudaStream_t stream,
                        bool pdl) {
  const int num_ids = num_prompt + num_answer;
  if (num_ids == 0) return;
  launch(count_tokens_kernel, dim3(ceil_div(num_ids, kThreads)), dim3(kThreads), 0, stream, pdl, ids, num_prompt,
         num_ids, counts);
}

}  // namespace edgellm::kernels
