#include <cuda_fp16.h>

#include "../kernels/launch.hpp"
#include "convert.hpp"

namespace edgellm::plugins {
namespace {

constexpr int kThreads = 256;

unsigned blocks_for(std::size_t threads) { return static_cast<unsigned>((threads + kThreads - 1) / kThreads); }

__device__ float to_float(float v) { return v; }
__device__ float to_float(__half v) { return __half2float(v); }
__device__ float to_float(__nv_bfloat16 v) { return __bfloat162float(v); }
template <class T>
__device__ T from_float(float v);
template <>
__device__ float from_float<float>(float v) {
  return v;
}
template <>
__device__ __half from_float<__half>(float v) {
  return __float2half_rn(v);
}
template <>
__device__ __nv_bfloat16 from_float<__nv_bfloat16>(float v) {
  return __float2bfloat16(v);
}

template <class From, class To>
__global__ void __launch_bounds__(kThreads) convert_kernel(const From* in, To* out, std::size_t count) {
  const std::size_t i = static_cast<std::size_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i < count) out[i] = from_float<To>(to_float(in[i]));
}

template <class From, class To>
void convert(const From* in, To* out, std::size_t count, cudaStream_t stream) {
  if (count == 0) return;
  kernels::launch(convert_kernel<From, To>, dim3(blocks_for(count)), dim3(kThreads), 0, stream, false, in, out, count);
}

template <class To>
__global__ void __launch_bounds__(kThreads) finish_kernel(const FinishArgs p) {
  const int row = static_cast<int>(blockIdx.x) * kThreads + static_cast<int>(threadIdx.x), token = blockIdx.y;
  if (row >= p.num_rows) return;
  const float value = p.y[static_cast<std::size_t>(token) * p.num_rows + row];
  static_cast<To*>(p.out)[static_cast<std::size_t>(token) * p.stride + row] =
      from_float<To>(p.bias == nullptr ? value : value + p.bias[row]);
}

// A block a sequence; the first one also has the counters and gains.
__global__ void __launch_bounds__(kThreads) prepare_kernel(const PrepareArgs p) {
  const int b = static_cast<int>(blockIdx.x), tid = static_cast<int>(threadIdx.x);
  __shared__ int num_tokens;
  const std::int64_t write = p.write_indices[b];
  const bool inside = write >= 0 && write < p.capacity;
  if (tid == 0) {
    const std::int64_t room = inside ? p.capacity - write : 0;
    num_tokens = static_cast<int>(room < p.tokens_each ? room : p.tokens_each);
  }
  __syncthreads();
  const std::size_t first = static_cast<std::size_t>(b) * p.tokens_each;
  for (int s = tid; s < p.tokens_each; s += kThreads) {
    if (p.position_ids[first + s] < 0) atomicMin(&num_tokens, s);
  }
  __syncthreads();
  const int count = num_tokens;
  for (int s = tid; s < p.tokens_each; s += kThreads) {
    p.token_slots[first + s] = b;
    p.token_positions[first + s] = s < count ? static_cast<int>(write) + s : -1;
    const std::int64_t depth = p.position_ids[first + s] - write;
    p.depths[first + s] = s < count && depth > 0 ? static_cast<int>(depth < s ? depth : s) : 0;
  }
  const int skipped = (p.tokens_each - count) * p.out_width;
  __nv_bfloat16* left_out = p.out + (first + count) * p.out_width;
  for (int i = tid; i < skipped; i += kThreads) left_out[i] = __float2bfloat16(0.0f);
  if (tid == 0) {
    p.slots[b] = b;
    p.positions[b] = count > 0 ? static_cast<int>(write) : -1;
    p.starts[2 * b] = 0;
    p.starts[2 * b + 1] = count;
  }
  if (b != 0) return;
  for (int i = tid; i < p.num_counters; i += kThreads) p.counters[i] = 0;
  for (int i = tid; p.q_gain && i < p.head_dim; i += kThreads) {
    p.gains[i] = __float2bfloat16(p.q_gain[i]);
    p.gains[p.head_dim + i] = __float2bfloat16(p.k_gain[i]);
  }
}

}  // namespace

void to_float_async(const void* in, Activation type, float* out, std::size_t count, cudaStream_t stream) {
  if (type == Activation::fp16) return convert(static_cast<const __half*>(in), out, count, stream);
  convert(static_cast<const __nv_bfloat16*>(in), out, count, stream);
}
void to_bf16_async(const void* in_fp16, __nv_bfloat16* out, std::size_t count, cudaStream_t stream) {
  convert(static_cast<const __half*>(in_fp16), out, count, stream);
}
void to_fp16_async(const float* in, void* out_fp16, std::size_t count, cudaStream_t stream) {
  convert(in, static_cast<__half*>(out_fp16), count, stream);
}
void to_fp16_async(const __nv_bfloat16* in, void* out_fp16, std::size_t count, cudaStream_t stream) {
  convert(in, static_cast<__half*>(out_fp16), count, stream);
}

void finish_async(const FinishArgs& args, cudaStream_t stream) {
  const dim3 grid(blocks_for(static_cast<std::size_t>(args.num_rows)), static_cast<unsigned>(args.num_tokens));
  const auto run = [&](auto kernel) { kernels::launch(kernel, grid, dim3(kThreads), 0, stream, false, args); };
  if (args.float_output) return run(finish_kernel<float>);
  if (args.type == Activation::fp16) return run(finish_kernel<__half>);
  run(finish_kernel<__nv_bfloat16>);
}

void prepare_async(const PrepareArgs& args, cudaStream_t stream) {
  kernels::launch(prepare_kernel, dim3(static_cast<unsigned>(args.batch)), dim3(kThreads), 0, stream, false, args);
}

}  // namespace edgellm::plugins
