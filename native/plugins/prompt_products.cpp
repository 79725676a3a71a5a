#include "prompt_products.hpp"

#include <algorithm>
#include <map>
#include <mutex>

#include "edgellm/cublaslt.hpp"
#include "edgellm/cuda_try.hpp"
#include "edgellm/kernels/quantized.hpp"
#include "tensors.hpp"

namespace edgellm::plugins {
namespace {

constexpr std::int64_t kMostTokens = 1024;                   // of one product; longer prompts take several
constexpr std::int64_t kPartBytes = std::int64_t{8} << 20;   // of a weight in bf16: much of it stays in the L2 cache
constexpr std::size_t kLibraryBytes = std::size_t{4} << 20;  // cuBLASLt's own workspace
constexpr std::int64_t kPartRows = 128;                      // a part has a multiple of it

std::int64_t rows_of_part(std::int64_t rows, std::int64_t cols) {
  return std::min(rows, std::max(kPartRows, kPartBytes / (2 * cols) / kPartRows * kPartRows));
}

// The pieces of the workspace.
struct Scratch {
  Scratch(void* workspace, std::int64_t rows, std::int64_t cols, std::int64_t tokens, Activation type) {
    Pieces pieces(workspace);
    const auto part = static_cast<std::size_t>(rows_of_part(rows, cols));
    const auto width = static_cast<std::size_t>(cols), count = static_cast<std::size_t>(tokens);
    weight = pieces.take<__nv_bfloat16>(part * width);
    y = pieces.take<float>(count * part);
    x = pieces.take<__nv_bfloat16>(type == Activation::fp16 ? count * width : 0);
    library = pieces.take<std::byte>(kLibraryBytes);
    used = pieces.used();
  }
  __nv_bfloat16* weight;
  float* y;
  __nv_bfloat16* x;
  std::byte* library;
  std::size_t used;
};

// cuBLASLt's handles and choices of algorithms, one for each device; they live as long as the process, because CUDA may
// be gone before what is static.
struct Products {
  std::mutex mutex;
  std::map<int, MatrixProducts> of_device;
};

Products& products() {
  static auto* all = new Products;
  return *all;
}

}  // namespace

std::size_t prompt_workspace_bytes(std::int64_t rows, std::int64_t cols, std::int64_t most_tokens, Activation type) {
  if (most_tokens < kFewestPromptTokens) return 0;
  return Scratch(nullptr, rows, cols, std::min(most_tokens, kMostTokens), type).used;
}

bool prompt_product_async(const PromptProduct& product) {
  if (!MatrixProducts::unavailable_reason().empty()) return false;
  const int rows = product.weight.rows, cols = product.weight.cols;
  const auto part = static_cast<int>(rows_of_part(rows, cols));
  const auto most = static_cast<int>(std::min(product.num_tokens, kMostTokens));
  const Scratch scratch(product.workspace, rows, cols, most, product.type);
  constexpr ProductType kType = ProductType::bf16_to_fp32;
  int device = 0;
  EDGELLM_CUDA_TRY(cudaGetDevice(&device));
  Products& all = products();
  const std::lock_guard lock(all.mutex);
  MatrixProducts& library =
      all.of_device.try_emplace(device, static_cast<int>(kMostTokens), kLibraryBytes).first->second;
  for (const int height : {part, rows % part}) {
    if (height > 0 && !library.guess(kType, height, cols)) return false;
  }
  for (std::int64_t first = 0; first < product.num_tokens; first += kMostTokens) {
    const auto tokens = static_cast<int>(std::min(product.num_tokens - first, kMostTokens));
    // fp16 and bf16 are of one size.
    const auto* x = static_cast<const __nv_bfloat16*>(product.x) + first * cols;
    if (product.type == Activation::fp16) {
      to_bf16_async(x, scratch.x, static_cast<std::size_t>(tokens) * static_cast<std::size_t>(cols), product.stream);
      x = scratch.x;
    }
    for (int row = 0; row < rows; row += part) {
      const int height = std::min(part, rows - row);
      kernels::dequantize_async(product.weight, false, row, height, scratch.weight, product.stream, false);
      library.run_async(kType, x, scratch.weight, scratch.y, tokens, height, cols, height, product.stream,
                        scratch.library);
      FinishArgs finish;
      finish.y = scratch.y;
      finish.bias = product.bias != nullptr ? product.bias + row : nullptr;
      finish.num_tokens = tokens;
      finish.num_rows = height;
      finish.stride = rows;
      const std::int64_t at = first * rows + row;
      finish.out = product.float_output ? static_cast<void*>(static_cast<float*>(product.y) + at)
                                        : static_cast<__nv_bfloat16*>(product.y) + at;
      finish.type = product.type;
      finish.float_output = product.float_output;
      finish_async(finish, product.stream);
    }
  }
  return true;
}

}  // namespace edgellm::plugins
