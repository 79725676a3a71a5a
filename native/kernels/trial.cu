// Inputs and checksums for trying out algorithms at load.
#include "device.cuh"
#include "edgellm/kernels/trial.hpp"
#include "launch.hpp"

namespace edgellm::kernels {

namespace {

constexpr int kThreads = 256;
constexpr unsigned kBlocks = 1024;

// The finaliser of MurmurHash3 (Appleby, public domain): every input bit changes half of the output's.
__device__ __forceinline__ uint32_t mixed(uint32_t v) {
  v = (v ^ (v >> 16)) * 0x85ebca6bu;
  v = (v ^ (v >> 13)) * 0xc2b2ae35u;
  return v ^ (v >> 16);
}

template <bool kFp8>
__global__ void __launch_bounds__(kThreads) fill_random_kernel(uint32_t* out, std::size_t num_words, uint32_t seed) {
  for (std::size_t i = static_cast<std::size_t>(blockIdx.x) * kThreads + threadIdx.x; i < num_words;
       i += static_cast<std::size_t>(gridDim.x) * kThreads) {
    const uint32_t bits = mixed(static_cast<uint32_t>(i) ^ mixed(static_cast<uint32_t>(i >> 32) + seed));
    // E4M3 without its highest exponent bit is below 2, and never NaN.
    out[i] = kFp8 ? bits & 0xbfbfbfbfu
                  : pack_bf16(static_cast<float>(static_cast<int16_t>(bits & 0xffffu)) * (2.0f / 32768.0f),
                              static_cast<float>(static_cast<int16_t>(bits >> 16)) * (2.0f / 32768.0f));
  }
}

__global__ void __launch_bounds__(kThreads)
    checksum_kernel(const uint32_t* data, std::size_t num_words, unsigned long long* sum) {
  unsigned long long own = 0;
  for (std::size_t i = static_cast<std::size_t>(blockIdx.x) * kThreads + threadIdx.x; i < num_words;
       i += static_cast<std::size_t>(gridDim.x) * kThreads) {
    const uint32_t low = mixed(data[i] ^ mixed(static_cast<uint32_t>(i)));
    own += (static_cast<unsigned long long>(mixed(low ^ 0x9e3779b9u)) << 32) | low;
  }
#pragma unroll
  for (int s = 16; s >= 1; s >>= 1) own += __shfl_xor_sync(kAllLanes, own, s);
  if ((threadIdx.x & 31) == 0) atomicAdd(sum, own);
}

}  // namespace

void fill_random_bf16_async(void* out, std::size_t num_bytes, std::uint32_t seed, cudaStream_t stream) {
  launch(fill_random_kernel<false>, dim3(kBlocks), dim3(kThreads), 0, stream, false, static_cast<uint32_t*>(out),
         num_bytes / 4, seed);
}

void fill_random_fp8_async(void* out, std::size_t num_bytes, std::uint32_t seed, cudaStream_t stream) {
  launch(fill_random_kernel<true>, dim3(kBlocks), dim3(kThreads), 0, stream, false, static_cast<uint32_t*>(out),
         num_bytes / 4, seed);
}

void checksum_async(const void* data, std::size_t num_bytes, unsigned long long* sum, cudaStream_t stream) {
  launch(checksum_kernel, dim3(kBlocks), dim3(kThreads), 0, stream, false, static_cast<const uint32_t*>(data),
         num_bytes / 4, sum);
}

}  // namespace edgellm::kernels
