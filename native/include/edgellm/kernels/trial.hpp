// Inputs and checksums for trying out algorithms at load.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>

namespace edgellm::kernels {

// Pseudo-random bf16 in [-2, 2], or E4M3 below 2 in magnitude; a function of seed and index alone. num_bytes: a
// multiple of 4.
void fill_random_bf16_async(void* out, std::size_t num_bytes, std::uint32_t seed, cudaStream_t stream);
void fill_random_fp8_async(void* out, std::size_t num_bytes, std::uint32_t seed, cudaStream_t stream);

// Adds to *sum a number that changes with any bit of data and with its place. num_bytes: a multiple of 4.
void checksum_async(const void* data, std::size_t num_bytes, unsigned long long* sum, cudaStream_t stream);

}  // namespace edgellm::kernels
