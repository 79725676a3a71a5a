// Prefill's matrix products through cuBLASLt, which is loaded at run time so that a machine without it still decodes.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <memory>
#include <string>

namespace edgellm {

// Products Y = X W^T of bf16 rows with a bf16 weight, accumulated in fp32.
// A row's result never depends on how many rows there are: each weight shape keeps one algorithm that does not split K.
class MatrixProducts {
 public:
  static constexpr std::size_t kWorkspaceBytes = std::size_t{32} << 20;  // what NVIDIA advises for Hopper

  // Why there is no cuBLASLt here; empty when there is.
  static std::string unavailable_reason();

  // workspace: kWorkspaceBytes of device memory that outlives this. max_rows: the most rows that run_async will get.
  // Throws CudaError when cuBLASLt fails, std::runtime_error when it is not there.
  MatrixProducts(std::byte* workspace, int max_rows);
  ~MatrixProducts();
  MatrixProducts(const MatrixProducts&) = delete;
  MatrixProducts& operator=(const MatrixProducts&) = delete;

  // Finds the algorithm of a weight shape; at load, because it takes time.
  void prepare(int out_features, int in_features);

  // x: (num_rows, in) bf16; weight: (out, in) bf16; y: (num_rows, out) bf16 whose rows are `stride` elements apart;
  // device memory, 16-byte aligned.
  void run_async(const void* x, const void* weight, void* y, int num_rows, int out_features, int in_features,
                 int stride, cudaStream_t stream);

 private:
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace edgellm
