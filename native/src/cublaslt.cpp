#include "edgellm/cublaslt.hpp"

#include <stdexcept>
#include <string>

#include "edgellm/cuda_try.hpp"

#ifdef EDGELLM_WITH_CUBLASLT

#include <cublasLt.h>
#include <dlfcn.h>

#include <map>
#include <utility>

namespace edgellm {
namespace {

#define EDGELLM_CUBLAS_FUNCTIONS(X)       \
  X(cublasLtCreate)                       \
  X(cublasLtDestroy)                      \
  X(cublasLtMatmul)                       \
  X(cublasLtMatmulDescCreate)             \
  X(cublasLtMatmulDescDestroy)            \
  X(cublasLtMatmulDescSetAttribute)       \
  X(cublasLtMatrixLayoutCreate)           \
  X(cublasLtMatrixLayoutDestroy)          \
  X(cublasLtMatmulPreferenceCreate)       \
  X(cublasLtMatmulPreferenceDestroy)      \
  X(cublasLtMatmulPreferenceSetAttribute) \
  X(cublasLtMatmulAlgoGetHeuristic)       \
  X(cublasLtMatmulAlgoCheck)              \
  X(cublasLtMatmulAlgoConfigGetAttribute)

// The library, never unloaded: it keeps threads and device state of its own.
struct Library {
  void* handle = nullptr;
  std::string reason;  // why handle is null
#define EDGELLM_DECLARE(name) decltype(&::name) name = nullptr;
  EDGELLM_CUBLAS_FUNCTIONS(EDGELLM_DECLARE)
#undef EDGELLM_DECLARE

  Library() {
    // The major version of the header: the enums and structs must be the library's.
    const std::string name = "libcublasLt.so." + std::to_string(CUBLAS_VER_MAJOR);
    handle = dlopen(name.c_str(), RTLD_NOW | RTLD_LOCAL);
    if (handle == nullptr) {
      const char* error = dlerror();
      reason = error != nullptr ? error : name + " cannot be loaded";
      return;
    }
#define EDGELLM_LOAD(name)                                       \
  name = reinterpret_cast<decltype(name)>(dlsym(handle, #name)); \
  if (name == nullptr) reason = std::string("libcublasLt has no ") + #name;
    EDGELLM_CUBLAS_FUNCTIONS(EDGELLM_LOAD)
#undef EDGELLM_LOAD
  }
};

const Library& library() {
  static const Library loaded;
  return loaded;
}

void check(cublasStatus_t status, const char* call, int line) {
  if (status == CUBLAS_STATUS_SUCCESS) return;
  (void)cudaGetLastError();
  throw CudaError(cudaErrorUnknown, "cublaslt.cpp:" + std::to_string(line) + ": " + call + " failed: cuBLAS status " +
                                        std::to_string(static_cast<int>(status)));
}
#define EDGELLM_CUBLAS_TRY(call) check((library().call), #call, __LINE__)

class Layout {
 public:
  Layout(int rows, int columns, int stride) {  // bf16, column-major
    EDGELLM_CUBLAS_TRY(cublasLtMatrixLayoutCreate(&layout_, CUDA_R_16BF, static_cast<std::uint64_t>(rows),
                                                  static_cast<std::uint64_t>(columns), stride));
  }
  ~Layout() { (void)library().cublasLtMatrixLayoutDestroy(layout_); }
  Layout(const Layout&) = delete;
  Layout& operator=(const Layout&) = delete;
  cublasLtMatrixLayout_t get() const { return layout_; }

 private:
  cublasLtMatrixLayout_t layout_ = nullptr;
};

}  // namespace

struct MatrixProducts::State {
  using Key = std::pair<int, int>;

  cublasLtHandle_t handle = nullptr;
  cublasLtMatmulDesc_t product = nullptr;
  std::byte* workspace = nullptr;
  int max_rows = 0;
  std::map<Key, cublasLtMatmulAlgo_t> algorithms;

  State() = default;
  State(const State&) = delete;
  State& operator=(const State&) = delete;
  ~State() {
    if (product != nullptr) (void)library().cublasLtMatmulDescDestroy(product);
    if (handle != nullptr) (void)library().cublasLtDestroy(handle);
  }
};

std::string MatrixProducts::unavailable_reason() { return library().reason; }

MatrixProducts::MatrixProducts(std::byte* workspace, int max_rows) : state_(std::make_unique<State>()) {
  if (!library().reason.empty()) throw std::runtime_error(library().reason);
  state_->workspace = workspace;
  state_->max_rows = max_rows;
  EDGELLM_CUBLAS_TRY(cublasLtCreate(&state_->handle));
  EDGELLM_CUBLAS_TRY(cublasLtMatmulDescCreate(&state_->product, CUBLAS_COMPUTE_32F, CUDA_R_32F));
  const cublasOperation_t transpose = CUBLAS_OP_T;
  EDGELLM_CUBLAS_TRY(
      cublasLtMatmulDescSetAttribute(state_->product, CUBLASLT_MATMUL_DESC_TRANSA, &transpose, sizeof(transpose)));
}

MatrixProducts::~MatrixProducts() = default;

void MatrixProducts::prepare(int out_features, int in_features) {
  const State::Key key{out_features, in_features};
  if (state_->algorithms.contains(key)) return;
  cublasLtMatmulPreference_t preference = nullptr;
  EDGELLM_CUBLAS_TRY(cublasLtMatmulPreferenceCreate(&preference));
  const std::unique_ptr<cublasLtMatmulPreferenceOpaque_t, void (*)(cublasLtMatmulPreference_t)> owner(
      preference, [](cublasLtMatmulPreference_t p) { (void)library().cublasLtMatmulPreferenceDestroy(p); });
  const std::size_t workspace = kWorkspaceBytes;
  EDGELLM_CUBLAS_TRY(cublasLtMatmulPreferenceSetAttribute(preference, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES,
                                                          &workspace, sizeof(workspace)));
  // No split of K: the sum's order, and with it the bits, would depend on the number of rows.
  const std::uint32_t no_reduction = CUBLASLT_REDUCTION_SCHEME_NONE;
  EDGELLM_CUBLAS_TRY(cublasLtMatmulPreferenceSetAttribute(preference, CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK,
                                                          &no_reduction, sizeof(no_reduction)));
  const Layout weight(in_features, out_features, in_features);
  const Layout x(in_features, state_->max_rows, in_features);
  const Layout y(out_features, state_->max_rows, out_features);
  const Layout few_x(in_features, 2, in_features);
  const Layout few_y(out_features, 2, out_features);
  cublasLtMatmulHeuristicResult_t results[16];
  int count = 0;
  EDGELLM_CUBLAS_TRY(cublasLtMatmulAlgoGetHeuristic(state_->handle, state_->product, weight.get(), x.get(), y.get(),
                                                    y.get(), preference, 16, results, &count));
  for (int i = 0; i < count; ++i) {
    if (results[i].state != CUBLAS_STATUS_SUCCESS) continue;
    std::int32_t splits = 0;
    std::size_t written = 0;
    EDGELLM_CUBLAS_TRY(cublasLtMatmulAlgoConfigGetAttribute(&results[i].algo, CUBLASLT_ALGO_CONFIG_SPLITK_NUM, &splits,
                                                            sizeof(splits), &written));
    cublasLtMatmulHeuristicResult_t few{};
    const bool any_rows =
        library().cublasLtMatmulAlgoCheck(state_->handle, state_->product, weight.get(), few_x.get(), few_y.get(),
                                          few_y.get(), &results[i].algo, &few) == CUBLAS_STATUS_SUCCESS &&
        few.workspaceSize <= kWorkspaceBytes;
    if (splits <= 1 && any_rows) {
      state_->algorithms.emplace(key, results[i].algo);
      return;
    }
  }
  throw CudaError(cudaErrorNotSupported, "cuBLASLt has no algorithm without a split of K for a weight of " +
                                             std::to_string(out_features) + " x " + std::to_string(in_features));
}

void MatrixProducts::run_async(const void* x, const void* weight, void* y, int num_rows, int out_features,
                               int in_features, int stride, cudaStream_t stream) {
  const auto found = state_->algorithms.find(State::Key{out_features, in_features});
  if (found == state_->algorithms.end() || num_rows > state_->max_rows) {
    throw std::logic_error("a product that was not prepared");
  }
  const Layout weight_layout(in_features, out_features, in_features);
  const Layout x_layout(in_features, num_rows, in_features);
  const Layout y_layout(out_features, num_rows, stride);
  const float one = 1.0F;
  const float zero = 0.0F;
  EDGELLM_CUBLAS_TRY(cublasLtMatmul(state_->handle, state_->product, &one, weight, weight_layout.get(), x,
                                    x_layout.get(), &zero, y, y_layout.get(), y, y_layout.get(), &found->second,
                                    state_->workspace, kWorkspaceBytes, stream));
}

}  // namespace edgellm

#else  // built without cublasLt.h

namespace edgellm {

struct MatrixProducts::State {};

std::string MatrixProducts::unavailable_reason() { return "this build had no cublasLt.h"; }

MatrixProducts::MatrixProducts(std::byte*, int) { throw std::runtime_error(unavailable_reason()); }

MatrixProducts::~MatrixProducts() = default;

void MatrixProducts::prepare(int, int) {}

void MatrixProducts::run_async(const void*, const void*, void*, int, int, int, int, cudaStream_t) {}

}  // namespace edgellm

#endif
