// Rows that do not lie together, one behind the other.
#include <cassert>

#include "device.cuh"
#include "edgellm/kernels/gather_rows.hpp"
#include "launch.hpp"

namespace edgellm::kernels {

namespace {

constexpr int kThreads = 256;

__global__ void __launch_bounds__(kThreads)
    gather_rows_kernel(const bf16* x, const int32_t* rows, int hidden, bf16* out) {
  start_dependents();
  wait_for_predecessor();
  const int row = *static_cast<const volatile int32_t*>(rows + blockIdx.x);
  for (int i = threadIdx.x * 8; i < hidden; i += kThreads * 8) {
    const uint4 v = row < 0 ? make_uint4(0, 0, 0, 0) : load_activation(x + static_cast<std::size_t>(row) * hidden + i);
    *reinterpret_cast<uint4*>(out + static_cast<std::size_t>(blockIdx.x) * hidden + i) = v;
  }
}

}  // namespace

void gather_rows_async(const bf16* x, const int32_t* rows, int num_rows, int hidden, bf16* out, cudaStream_t stream,
                       bool pdl) {
  assert(hidden % 8 == 0);
  launch(gather_rows_kernel, dim3(num_rows), dim3(kThreads), 0, stream, pdl, x, rows, hidden, out);
}

}  // namespace edgellm::kernels
