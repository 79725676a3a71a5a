// Prefill's matrix products through cuBLASLt, which is loaded at run time so that a machine without it still decodes.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string>

namespace edgellm {

// Of x and weight; y is bf16. fp8 is E4M3 without scales: y stands for the product once its reader has applied them.
// bf16_to_fp32 has y in fp32.
enum class ProductType : std::uint8_t { bf16, fp8, bf16_to_fp32 };

// Device memory on which algorithms are tried at load; what it holds is lost. Types as ProductType says.
struct ProductTrial {
  std::byte* weight = nullptr;     // (out, in)
  std::byte* x = nullptr;          // (max_rows, in)
  std::byte* y = nullptr;          // (max_rows, out)
  std::span<std::byte> evictions;  // written before each timed product, so that the weight comes from memory; or empty
};

// Products Y = X W^T, accumulated in fp32. For every weight shape and class of row counts the fastest of cuBLASLt's
// algorithms is found by trying them at load.
class MatrixProducts {
 public:
  static constexpr std::size_t kWorkspaceBytes = std::size_t{32} << 20;  // what NVIDIA advises for Hopper
  static constexpr std::size_t kDeviceBytes = kWorkspaceBytes + 256;     // and checksums

  // Why there is no cuBLASLt here; empty when there is.
  static std::string unavailable_reason();

  // memory: kDeviceBytes of device memory that outlives this. max_rows: the most rows that run_async will get.
  // row_invariant: a row's result never depends on how many rows there are. Then no algorithm splits K, and one is
  // taken only if it computes, bit for bit on random inputs, what the first choice for max_rows computes.
  // Throws CudaError when cuBLASLt fails, std::runtime_error when it is not there.
  MatrixProducts(std::byte* memory, int max_rows, bool row_invariant);
  // For products whose shapes are not known at load: nothing is tried, no memory kept, and rows may differ in bits with
  // their number. run_async needs a workspace of workspace_bytes.
  MatrixProducts(int max_rows, std::size_t workspace_bytes);
  ~MatrixProducts();
  MatrixProducts(const MatrixProducts&) = delete;
  MatrixProducts& operator=(const MatrixProducts&) = delete;

  // Chooses the algorithms of a weight shape; at load, because it takes time and waits for the stream. False when
  // cuBLASLt has none for this type and shape on this GPU.
  bool prepare(ProductType type, int out_features, int in_features, const ProductTrial& trial, cudaStream_t stream);
  // The same by cuBLASLt's first guesses, which takes no device and no time.
  bool guess(ProductType type, int out_features, int in_features);

  // x: (num_rows, in), at least two rows; weight: (out, in); y: (num_rows, out) whose rows are `stride` elements
  // apart; device memory, 256-byte aligned. workspace: kWorkspaceBytes, or null for the one in `memory`; products that
  // may run at the same time need different ones.
  void run_async(ProductType type, const void* x, const void* weight, void* y, int num_rows, int out_features,
                 int in_features, int stride, cudaStream_t stream, std::byte* workspace = nullptr);

 private:
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace edgellm
