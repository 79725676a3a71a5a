#include "edgellm/cublaslt.hpp"

#include <stdexcept>
#include <string>

#include "edgellm/cuda_try.hpp"

#ifdef EDGELLM_WITH_CUBLASLT

#include <cublasLt.h>
#include <dlfcn.h>

#include <algorithm>
#include <array>
#include <chrono>
#include <limits>
#include <map>
#include <tuple>
#include <vector>

#include "edgellm/kernels/trial.hpp"
#include "edgellm/stream.hpp"

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
  Layout(cudaDataType type, int rows, int columns, int stride) {  // column-major
    EDGELLM_CUBLAS_TRY(cublasLtMatrixLayoutCreate(&layout_, type, static_cast<std::uint64_t>(rows),
                                                  static_cast<std::uint64_t>(columns), stride));
  }
  ~Layout() { (void)library().cublasLtMatrixLayoutDestroy(layout_); }
  Layout(const Layout&) = delete;
  Layout& operator=(const Layout&) = delete;
  cublasLtMatrixLayout_t get() const { return layout_; }

 private:
  cublasLtMatrixLayout_t layout_ = nullptr;
};

constexpr cudaDataType data_type(ProductType type) { return type == ProductType::fp8 ? CUDA_R_8F_E4M3 : CUDA_R_16BF; }
constexpr cudaDataType result_type(ProductType type) {
  return type == ProductType::bf16_to_fp32 ? CUDA_R_32F : CUDA_R_16BF;
}

// The three matrices of a product as cuBLASLt sees them: Y^T = W X^T, column-major.
struct Layouts {
  Layouts(ProductType type, int num_rows, int out_features, int in_features, int stride)
      : weight(data_type(type), in_features, out_features, in_features),
        x(data_type(type), in_features, num_rows, in_features),
        y(result_type(type), out_features, num_rows, stride) {}

  Layout weight;
  Layout x;
  Layout y;
};

// A product of up to so many rows has its own algorithm.
constexpr std::array kRowClasses = {16, 32, 64, 128, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096, 6144};
constexpr int kMaxClasses = static_cast<int>(kRowClasses.size()) + 1;
constexpr int kCandidates = 16;
constexpr int kTimings = 4;
constexpr std::chrono::seconds kMostTrialTime{2};  // a weight shape; then the algorithms not yet tried are left out
constexpr float kHopeless = 1.2F;                  // times the best time: not timed again
// Weights of fewer numbers are multiplied in no time by any algorithm: cuBLASLt's first guess serves all rows.
constexpr std::int64_t kFewestTimed = std::int64_t{1} << 21;

struct RowClass {
  int most_rows = 0;
  cublasLtMatmulAlgo_t algorithm{};
};

}  // namespace

struct MatrixProducts::State {
  using Key = std::tuple<ProductType, int, int>;
  using Sums = std::array<unsigned long long, kMaxClasses>;

  cublasLtHandle_t handle = nullptr;
  std::array<cublasLtMatmulDesc_t, 3> products{};  // by ProductType
  std::byte* workspace = nullptr;
  std::size_t workspace_bytes = kWorkspaceBytes;
  unsigned long long* sums = nullptr;  // (kMaxClasses), device
  int max_rows = 0;
  bool row_invariant = true;
  std::map<Key, std::vector<RowClass>> algorithms;  // by rising most_rows

  State() = default;
  State(const State&) = delete;
  State& operator=(const State&) = delete;
  ~State() {
    for (cublasLtMatmulDesc_t product : products) {
      if (product != nullptr) (void)library().cublasLtMatmulDescDestroy(product);
    }
    if (handle != nullptr) (void)library().cublasLtDestroy(handle);
  }

  cublasLtMatmulDesc_t product(ProductType type) const { return products[static_cast<std::size_t>(type)]; }

  void run_async(ProductType type, const Layouts& layouts, const cublasLtMatmulAlgo_t& algorithm, const void* x,
                 const void* weight, void* y, cudaStream_t stream, std::byte* own_workspace) const {
    const float one = 1.0F;
    const float zero = 0.0F;
    EDGELLM_CUBLAS_TRY(cublasLtMatmul(handle, product(type), &one, weight, layouts.weight.get(), x, layouts.x.get(),
                                      &zero, y, layouts.y.get(), y, layouts.y.get(), &algorithm, own_workspace,
                                      workspace_bytes, stream));
  }

  void create();

  // cuBLASLt's guesses for num_rows rows, the best first, that also take fewest_rows.
  std::vector<cublasLtMatmulAlgo_t> candidates(ProductType type, int num_rows, int fewest_rows, int out_features,
                                               int in_features) const;
  // The time of the product in ms, not exact where it is far above `best`.
  float measure_ms(ProductType type, const Layouts& layouts, const cublasLtMatmulAlgo_t& algorithm,
                   const ProductTrial& trial, float best, cudaStream_t stream) const;
  // Runs the algorithm; checksums of y's first `counts` rows.
  Sums checksums(ProductType type, const Layouts& layouts, const cublasLtMatmulAlgo_t& algorithm,
                 const ProductTrial& trial, std::span<const int> counts, int out_features, cudaStream_t stream) const;
};

std::vector<cublasLtMatmulAlgo_t> MatrixProducts::State::candidates(ProductType type, int num_rows, int fewest_rows,
                                                                    int out_features, int in_features) const {
  cublasLtMatmulPreference_t preference = nullptr;
  EDGELLM_CUBLAS_TRY(cublasLtMatmulPreferenceCreate(&preference));
  const std::unique_ptr<cublasLtMatmulPreferenceOpaque_t, void (*)(cublasLtMatmulPreference_t)> owner(
      preference, [](cublasLtMatmulPreference_t p) { (void)library().cublasLtMatmulPreferenceDestroy(p); });
  const std::size_t most_workspace = workspace_bytes;
  EDGELLM_CUBLAS_TRY(cublasLtMatmulPreferenceSetAttribute(preference, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES,
                                                          &most_workspace, sizeof(most_workspace)));
  if (row_invariant) {  // a split K's sum has an order, and with it bits, that depend on the number of rows
    const std::uint32_t no_reduction = CUBLASLT_REDUCTION_SCHEME_NONE;
    EDGELLM_CUBLAS_TRY(cublasLtMatmulPreferenceSetAttribute(preference, CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK,
                                                            &no_reduction, sizeof(no_reduction)));
  }
  const Layouts layouts(type, num_rows, out_features, in_features, out_features);
  const Layouts few(type, fewest_rows, out_features, in_features, out_features);
  cublasLtMatmulHeuristicResult_t results[kCandidates];
  int count = 0;
  const cublasStatus_t status = library().cublasLtMatmulAlgoGetHeuristic(
      handle, product(type), layouts.weight.get(), layouts.x.get(), layouts.y.get(), layouts.y.get(), preference,
      kCandidates, results, &count);
  std::vector<cublasLtMatmulAlgo_t> found;
  if (status != CUBLAS_STATUS_SUCCESS) return found;  // it knows none
  for (int i = 0; i < count; ++i) {
    if (results[i].state != CUBLAS_STATUS_SUCCESS) continue;
    std::int32_t splits = 0;
    std::size_t written = 0;
    EDGELLM_CUBLAS_TRY(cublasLtMatmulAlgoConfigGetAttribute(&results[i].algo, CUBLASLT_ALGO_CONFIG_SPLITK_NUM, &splits,
                                                            sizeof(splits), &written));
    cublasLtMatmulHeuristicResult_t checked{};
    const bool any_rows =
        library().cublasLtMatmulAlgoCheck(handle, product(type), few.weight.get(), few.x.get(), few.y.get(),
                                          few.y.get(), &results[i].algo, &checked) == CUBLAS_STATUS_SUCCESS &&
        checked.workspaceSize <= workspace_bytes;
    if (any_rows && (splits <= 1 || !row_invariant)) found.push_back(results[i].algo);
  }
  return found;
}

float MatrixProducts::State::measure_ms(ProductType type, const Layouts& layouts, const cublasLtMatmulAlgo_t& algorithm,
                                        const ProductTrial& trial, float best, cudaStream_t stream) const {
  Event begin(true);
  Event end(true);
  float least = std::numeric_limits<float>::max();
  for (int i = 0; i < kTimings; ++i) {
    if (!trial.evictions.empty()) {
      EDGELLM_CUDA_TRY(cudaMemsetAsync(trial.evictions.data(), 0, trial.evictions.size(), stream));
    }
    begin.record(stream);
    run_async(type, layouts, algorithm, trial.x, trial.weight, trial.y, stream, workspace);
    end.record(stream);
    end.wait();
    if (i == 0) continue;  // its code was loaded
    least = std::min(least, end.elapsed_ms(begin));
    if (least > best * kHopeless) break;
  }
  return least;
}

MatrixProducts::State::Sums MatrixProducts::State::checksums(ProductType type, const Layouts& layouts,
                                                             const cublasLtMatmulAlgo_t& algorithm,
                                                             const ProductTrial& trial, std::span<const int> counts,
                                                             int out_features, cudaStream_t stream) const {
  const std::size_t row_bytes = static_cast<std::size_t>(out_features) * (type == ProductType::bf16_to_fp32 ? 4 : 2);
  // NaN everywhere, so that rows that an algorithm leaves out show.
  EDGELLM_CUDA_TRY(cudaMemsetAsync(trial.y, 0xff, row_bytes * static_cast<std::size_t>(counts.back()), stream));
  EDGELLM_CUDA_TRY(cudaMemsetAsync(sums, 0, sizeof(Sums), stream));
  run_async(type, layouts, algorithm, trial.x, trial.weight, trial.y, stream, workspace);
  for (std::size_t i = 0; i < counts.size(); ++i) {
    kernels::checksum_async(trial.y, row_bytes * static_cast<std::size_t>(counts[i]), sums + i, stream);
  }
  Sums host{};
  EDGELLM_CUDA_TRY(cudaMemcpyAsync(host.data(), sums, sizeof(Sums), cudaMemcpyDeviceToHost, stream));
  EDGELLM_CUDA_TRY(cudaStreamSynchronize(stream));
  return host;
}

std::string MatrixProducts::unavailable_reason() { return library().reason; }

MatrixProducts::MatrixProducts(std::byte* memory, int max_rows, bool row_invariant)
    : state_(std::make_unique<State>()) {
  static_assert(sizeof(State::Sums) <= kDeviceBytes - kWorkspaceBytes);
  state_->workspace = memory;
  state_->sums = reinterpret_cast<unsigned long long*>(memory + kWorkspaceBytes);
  state_->max_rows = max_rows;
  state_->row_invariant = row_invariant;
  state_->create();
}

MatrixProducts::MatrixProducts(int max_rows, std::size_t workspace_bytes) : state_(std::make_unique<State>()) {
  state_->workspace_bytes = workspace_bytes;
  state_->max_rows = max_rows;
  state_->row_invariant = false;
  state_->create();
}

void MatrixProducts::State::create() {
  if (!library().reason.empty()) throw std::runtime_error(library().reason);
  EDGELLM_CUBLAS_TRY(cublasLtCreate(&handle));
  for (const ProductType type : {ProductType::bf16, ProductType::fp8, ProductType::bf16_to_fp32}) {
    cublasLtMatmulDesc_t& product = products[static_cast<std::size_t>(type)];
    EDGELLM_CUBLAS_TRY(cublasLtMatmulDescCreate(&product, CUBLAS_COMPUTE_32F, CUDA_R_32F));
    const cublasOperation_t transpose = CUBLAS_OP_T;
    EDGELLM_CUBLAS_TRY(
        cublasLtMatmulDescSetAttribute(product, CUBLASLT_MATMUL_DESC_TRANSA, &transpose, sizeof(transpose)));
    if (type == ProductType::fp8) {
      // Sums with the tensor cores' own 13 bits: 0.2 to 0.4 % of a sum of 4,096 to 14,336 products (emulated), beside
      // the 2.6 % that E4M3 takes from each operand.
      const std::int8_t fast = 1;
      EDGELLM_CUBLAS_TRY(cublasLtMatmulDescSetAttribute(product, CUBLASLT_MATMUL_DESC_FAST_ACCUM, &fast, sizeof(fast)));
    }
  }
}

MatrixProducts::~MatrixProducts() = default;

bool MatrixProducts::prepare(ProductType type, int out_features, int in_features, const ProductTrial& trial,
                             cudaStream_t stream) {
  const State::Key key{type, out_features, in_features};
  if (state_->algorithms.contains(key)) return true;
  std::vector<int> counts;
  for (const int rows : kRowClasses) {
    if (rows < state_->max_rows) counts.push_back(rows);
  }
  counts.push_back(state_->max_rows);
  const auto first = state_->candidates(type, state_->max_rows, 2, out_features, in_features);
  if (first.empty()) return false;
  const cublasLtMatmulAlgo_t reference = first.front();
  if (std::int64_t{out_features} * in_features < kFewestTimed) {
    state_->algorithms.emplace(key, std::vector{RowClass{state_->max_rows, reference}});
    return true;
  }

  const auto fill = type == ProductType::fp8 ? kernels::fill_random_fp8_async : kernels::fill_random_bf16_async;
  const std::size_t element = type == ProductType::fp8 ? 1 : 2;
  const std::size_t row_bytes = static_cast<std::size_t>(in_features) * element;
  fill(trial.weight, row_bytes * static_cast<std::size_t>(out_features), 1, stream);
  fill(trial.x, row_bytes * static_cast<std::size_t>(state_->max_rows), 2, stream);
  State::Sums wanted{};
  if (state_->row_invariant) {
    const Layouts layouts(type, state_->max_rows, out_features, in_features, out_features);
    wanted = state_->checksums(type, layouts, reference, trial, counts, out_features, stream);
  }
  const auto deadline = std::chrono::steady_clock::now() + kMostTrialTime;
  std::vector<RowClass> classes;
  for (std::size_t i = 0; i < counts.size(); ++i) {
    const int rows = counts[i];
    const int fewest = i == 0 ? std::min(2, rows) : counts[i - 1] + 1;
    const Layouts layouts(type, rows, out_features, in_features, out_features);
    RowClass chosen{rows, reference};
    float best = state_->measure_ms(type, layouts, reference, trial, std::numeric_limits<float>::max(), stream);
    for (const cublasLtMatmulAlgo_t& algorithm : state_->candidates(type, rows, fewest, out_features, in_features)) {
      if (std::chrono::steady_clock::now() > deadline) break;
      const float ms = state_->measure_ms(type, layouts, algorithm, trial, best, stream);
      if (ms >= best) continue;
      if (state_->row_invariant && state_->checksums(type, layouts, algorithm, trial, std::span(&rows, 1), out_features,
                                                     stream)[0] != wanted[i]) {
        continue;
      }
      best = ms;
      chosen.algorithm = algorithm;
    }
    classes.push_back(chosen);
  }
  state_->algorithms.emplace(key, std::move(classes));
  return true;
}

bool MatrixProducts::guess(ProductType type, int out_features, int in_features) {
  const State::Key key{type, out_features, in_features};
  if (state_->algorithms.contains(key)) return true;
  std::vector<RowClass> classes;
  for (std::size_t i = 0; i <= kRowClasses.size(); ++i) {
    const int rows = i < kRowClasses.size() ? std::min(kRowClasses[i], state_->max_rows) : state_->max_rows;
    const int fewest = classes.empty() ? std::min(2, rows) : classes.back().most_rows + 1;
    if (fewest > rows) break;
    const auto found = state_->candidates(type, rows, fewest, out_features, in_features);
    if (found.empty()) return false;
    classes.push_back({rows, found.front()});
  }
  state_->algorithms.emplace(key, std::move(classes));
  return true;
}

void MatrixProducts::run_async(ProductType type, const void* x, const void* weight, void* y, int num_rows,
                               int out_features, int in_features, int stride, cudaStream_t stream,
                               std::byte* workspace) {
  const auto found = state_->algorithms.find(State::Key{type, out_features, in_features});
  if (found == state_->algorithms.end() || num_rows > state_->max_rows) {
    throw std::logic_error("a product that was not prepared");
  }
  const auto row_class = std::find_if(found->second.begin(), found->second.end(),
                                      [num_rows](const RowClass& c) { return num_rows <= c.most_rows; });
  const Layouts layouts(type, num_rows, out_features, in_features, stride);
  state_->run_async(type, layouts, row_class->algorithm, x, weight, y, stream,
                    workspace != nullptr ? workspace : state_->workspace);
}

}  // namespace edgellm

#else  // built without cublasLt.h

namespace edgellm {

struct MatrixProducts::State {};

std::string MatrixProducts::unavailable_reason() { return "this build had no cublasLt.h"; }

MatrixProducts::MatrixProducts(std::byte*, int, bool) { throw std::runtime_error(unavailable_reason()); }

MatrixProducts::~MatrixProducts() = default;

MatrixProducts::MatrixProducts(int, std::size_t) { throw std::runtime_error(unavailable_reason()); }

bool MatrixProducts::prepare(ProductType, int, int, const ProductTrial&, cudaStream_t) { return false; }

bool MatrixProducts::guess(ProductType, int, int) { return false; }

void MatrixProducts::run_async(ProductType, const void*, const void*, void*, int, int, int, int, cudaStream_t,
                               std::byte*) {}

}  // namespace edgellm

#endif
