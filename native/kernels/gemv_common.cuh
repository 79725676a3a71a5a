// What the GEMV kernels share: their parameters, which rows a block has, and what becomes of a finished sum.
#pragma once

#include <type_traits>

#include "device.cuh"
#include "edgellm/kernels/gemv.hpp"
#include "lora.cuh"

namespace edgellm::kernels {

// What a kernel multiplies: x, x with a norm, or x_f32 with a norm.
enum class XKind { plain, normed, wide };

// Whether the kernels for these weights take x_f32: the rounding of other formats hides that of x.
constexpr bool takes_wide_x(WeightFormat format) { return format == WeightFormat::bf16; }

struct GemvParams {
  const void* data;    // (rows, cols)
  const void* scales;  // as WeightView
  const bf16* x;       // (num_tokens, cols); XKind::wide: see wide_x
  const bf16* gain;    // (cols)
  const float* bias;   // (rows), or null
  float* out_f32;
  bf16* out_bf16;
  unsigned long long* block_max;  // (num_tokens, num_blocks), or null
  int rows;
  int cols;
  int group_shift;  // log2 of the group: a division of two integers costs more than a load
  int num_tokens;
  int num_blocks;      // of block_row
  float inverse_cols;  // 1 / cols
  float norm_eps;
  Epilogue epilogue;
  LoraView lora;
};

// What a kernel of XKind::wide has for x. One place for either leaves the others' parameters as they are.
__device__ __forceinline__ const float* wide_x(const GemvParams& p) { return reinterpret_cast<const float*>(p.x); }

// Row r of block `block`'s R rows. With SwiGLU the first half are gate rows, the others the up rows that go with them.
// Rows past the end repeat the last one, so that loads need no guard; row_is_valid tells them apart.
template <int R>
__device__ __forceinline__ int block_row(const GemvParams& p, int block, int r) {
  if (has_pairs(p.epilogue)) {
    const int half = p.rows / 2;
    const int gate = min(block * (R / 2) + (r & (R / 2 - 1)), half - 1);
    return r < R / 2 ? gate : half + gate;
  }
  return min(block * R + r, p.rows - 1);
}
template <int R>
__device__ __forceinline__ bool row_is_valid(const GemvParams& p, int block, int r) {
  if (has_pairs(p.epilogue)) return block * (R / 2) + (r & (R / 2 - 1)) < p.rows / 2;
  return block * R + r < p.rows;
}

// Stores y, the finished sum (scaled, normed) of one row and token. SwiGLU's caller pairs the rows itself.
__device__ __forceinline__ void store_row(const GemvParams& p, float y, int token, int row, float old_residual) {
  const std::size_t at = static_cast<std::size_t>(token) * p.rows + row;
  switch (p.epilogue) {
    case Epilogue::residual: {
      const float sum = y + old_residual;
      p.out_f32[at] = sum;
      p.out_bf16[at] = __float2bfloat16(sum);
      break;
    }
    case Epilogue::store_bf16:
      p.out_bf16[at] = __float2bfloat16(y);
      break;
    default:
      p.out_f32[at] = y;
  }
}

// What a finished sum still needs, fetched before the sum is there: a load at the end would be waited for by every
// block, and by the next kernel.
template <WeightFormat F>
struct RowConstants {
  float bias = 0.0f;
  float scale = 1.0f;  // of the whole row: fp8

  __device__ __forceinline__ void load(const GemvParams& p, int row) {
    if (p.bias) bias = __ldg(p.bias + row);
    if constexpr (F == WeightFormat::fp8) {
      scale = __ldg(static_cast<const float*>(p.scales) + row) * (1.0f / kFp8ToFp16);
    } else if constexpr (F == WeightFormat::fp8_blocks) {
      scale = 1.0f / kFp8ToFp16;
    }
  }
  __device__ __forceinline__ float apply(float sum) const { return fmaf(sum, scale, bias); }
};

// One warp finishes one token's R <= 32 rows of block `block`: lane r < R has row r's sum, and every lane l has the
// `row` of l % R.
template <int R>
__device__ __forceinline__ void finish_rows(const GemvParams& p, float y, int lane, int token, int block, int row,
                                            float old_residual) {
  const bool valid = lane < R && row_is_valid<R>(p, block, lane);
  if (p.lora.linears) y += lora_sum<R>(p.lora, token, row, lane);
  if (has_pairs(p.epilogue)) {
    const float up = __shfl_down_sync(kAllLanes, y, R / 2);
    if (valid && lane < R / 2) {
      const Activation activation = p.epilogue == Epilogue::geglu ? Activation::gelu_tanh : Activation::silu;
      p.out_bf16[static_cast<std::size_t>(token) * (p.rows / 2) + row] = __float2bfloat16(gated(activation, y, up));
    }
    return;
  }
  if (valid) store_row(p, y, token, row, old_residual);
  if (p.epilogue == Epilogue::logits && p.block_max) {
    unsigned long long key = valid ? max_key(y, row) : 0ull;
#pragma unroll
    for (int s = R / 2; s >= 1; s >>= 1) key = larger(key, __shfl_xor_sync(kAllLanes, key, s));
    if (lane == 0) p.block_max[static_cast<std::size_t>(token) * p.num_blocks + block] = key;
  }
}

// The residual that finish_rows adds to, fetched early. Volatile: it was written by an earlier kernel.
__device__ __forceinline__ float load_residual(const GemvParams& p, int token, int row) {
  return p.epilogue == Epilogue::residual ? load_l2(p.out_f32 + static_cast<std::size_t>(token) * p.rows + row) : 0.0f;
}

// What the choice of a kernel depends on; the GPU at hand is gemv_device().
struct GemvDevice {
  int num_sms;
  std::size_t max_shared_bytes;  // a block
};
GemvDevice gemv_device();

// How a call is cut: one entry of its kernel family's table of configurations.
struct GemvTile {
  int config = 0;
  int rows_per_block = 0;  // of block_max and of block_row
  int threads = 0;
};

// Blocks of `rows_per_block` rows; SwiGLU's rows come in pairs.
inline int gemv_blocks(const GemvArgs& args, int rows_per_block) {
  const bool pairs = has_pairs(args.epilogue);
  return pairs ? ceil_div(args.weight.rows / 2, rows_per_block / 2) : ceil_div(args.weight.rows, rows_per_block);
}

inline int group_shift(int group) {
  int shift = 0;
  while (1 << shift < group) shift++;
  return shift;
}

inline GemvParams gemv_params(const GemvArgs& args, int rows_per_block, XKind kind = XKind::normed) {
  return {args.weight.data,
          args.weight.scales,
          kind == XKind::wide ? reinterpret_cast<const bf16*>(args.x_f32) : args.x,
          args.gain,
          args.bias,
          args.out_f32,
          args.out_bf16,
          args.block_max,
          args.weight.rows,
          args.weight.cols,
          group_shift(args.weight.group),
          args.num_tokens,
          gemv_blocks(args, rows_per_block),
          1.0f / static_cast<float>(args.weight.cols),
          args.norm_eps,
          args.epilogue,
          args.lora};
}

// Calls `launch` with the kind of x that the call has, as a type.
template <WeightFormat F, class Launch>
void launch_for_x_kind(const GemvArgs& args, const Launch& launch) {
  if constexpr (takes_wide_x(F)) {
    if (args.gain && args.x_f32) return launch(std::integral_constant<XKind, XKind::wide>());
  }
  if (args.gain) return launch(std::integral_constant<XKind, XKind::normed>());
  launch(std::integral_constant<XKind, XKind::plain>());
}

// Tokens first to first + most - 1 of a call, of whose block maxima a token has one for every `rows_per_block` rows.
inline GemvArgs gemv_part(const GemvArgs& args, int first, int most, int rows_per_block) {
  GemvArgs part = args;
  const auto offset = static_cast<std::size_t>(first);
  const int width = has_pairs(args.epilogue) ? args.weight.rows / 2 : args.weight.rows;
  part.num_tokens = args.num_tokens - first < most ? args.num_tokens - first : most;
  part.x += offset * args.weight.cols;
  if (part.x_f32) part.x_f32 += offset * args.weight.cols;
  if (part.out_f32) part.out_f32 += offset * width;
  if (part.out_bf16) part.out_bf16 += offset * width;
  if (part.block_max) part.block_max += offset * gemv_blocks(args, rows_per_block);
  if (part.lora.linears) part.lora = args.lora.from_token(first);
  return part;
}

// One translation unit a format, so that they compile side by side.
template <WeightFormat F>
void launch_gemv_fma(const GemvArgs& args, const GemvTile& tile, cudaStream_t stream, bool pdl);
template <WeightFormat F>
void launch_fma_several(const GemvArgs& args, const GemvTile& tile, cudaStream_t stream, bool pdl);
template <WeightFormat F>
void launch_gemv_mma(const GemvArgs& args, const GemvTile& tile, cudaStream_t stream, bool pdl);
template <WeightFormat F>
void launch_tensor_once(const GemvArgs& args, const GemvTile& tile, cudaStream_t stream, bool pdl);
template <WeightFormat F, int kMaxTokens>
void launch_tensor_ring(const GemvArgs& args, const GemvTile& tile, cudaStream_t stream, bool pdl);
template <WeightFormat F>
void launch_tensor_resident(const GemvArgs& args, const GemvTile& tile, cudaStream_t stream, bool pdl);
void launch_gemv_int4(const GemvArgs& args, const GemvTile& tile, cudaStream_t stream, bool pdl);

struct FmaConfig {
  int chunks;  // C: 16-byte loads of a row a thread
  int rows;    // R: rows a block
  int max_threads;
  int min_blocks;  // blocks an SM that the register budget allows
};
// Measured over the layers of 1B to 8B models: what is best differs with the shape, and these cover it.
constexpr FmaConfig kFmaConfigs16[] = {
    {1, 4, 512, 2}, {1, 8, 512, 2}, {1, 16, 256, 2}, {2, 4, 512, 2},
    {2, 8, 256, 2}, {4, 2, 512, 2}, {4, 4, 512, 1},  {8, 2, 512, 1},
};
// A thread's 16 bytes hold twice as many 8-bit weights, with twice the x to keep in registers: half as many threads
// cover a row.
constexpr FmaConfig kFmaConfigs8[] = {
    {1, 4, 256, 5}, {1, 8, 256, 4}, {1, 16, 256, 2}, {2, 4, 256, 4}, {2, 8, 256, 2}, {4, 2, 256, 4},
    {4, 4, 256, 2}, {1, 8, 128, 8}, {2, 4, 512, 2},  {3, 4, 256, 3}, {8, 2, 256, 1},
};
constexpr int kNumFmaConfigs16 = sizeof(kFmaConfigs16) / sizeof(kFmaConfigs16[0]);
constexpr int kNumFmaConfigs8 = sizeof(kFmaConfigs8) / sizeof(kFmaConfigs8[0]);
constexpr int num_fma_configs(bool is_8bit) { return is_8bit ? kNumFmaConfigs8 : kNumFmaConfigs16; }
constexpr FmaConfig fma_config(int index, bool is_8bit) { return is_8bit ? kFmaConfigs8[index] : kFmaConfigs16[index]; }

struct Int4Config {
  int warps;  // that share the input features
  int depth;  // D: blocks of 64 input features in flight a warp and tile
  int tiles;  // T: tiles of 16 rows a block
  int min_blocks;
  bool once;  // a warp's share is in flight as a whole: shorter, for up to warps * depth blocks of input features
};
constexpr Int4Config kInt4Configs[] = {
    {8, 4, 1, 4, false}, {16, 4, 1, 2, false}, {4, 4, 2, 5, false}, {8, 2, 2, 4, false}, {8, 2, 4, 2, false},
    {4, 8, 1, 6, true},  {8, 4, 1, 4, true},   {8, 5, 1, 4, true},  {8, 8, 1, 3, true},  {16, 4, 1, 2, true},
    {16, 8, 1, 1, true}, {16, 2, 2, 2, false}, {8, 4, 2, 2, true},  {8, 5, 2, 2, true},
};
constexpr int kNumInt4Configs = sizeof(kInt4Configs) / sizeof(kInt4Configs[0]);
// Groups below 64 are rare: they get the first of the table only.
constexpr int kNumInt4SmallGroupConfigs = 4;
constexpr int kMaxInt4Tokens = 4;  // of small groups, of one launch: two of the product's eight columns each
int int4_tokens_at_once(int cols, const GemvDevice& device);  // gemv_int4.cu
// gemv_int4_ring.cu: a block's shared memory at most, and whether a GPU has that for as many tokens as a launch takes.
std::size_t int4_ring_bytes(int warps, int tokens);
bool int4_ring_fits(int warps, const GemvDevice& device);
// 32-bit words of a staged block of 64 of int4's x: [digit: low, high][t][step] four bytes, then 1 / scale; padded so
// that 16-byte reads stay aligned and the writes of four blocks spread over the banks.
constexpr int kInt4StagedWords = 36;
constexpr std::size_t int4_staged_bytes(int cols) {  // of one token
  return static_cast<std::size_t>(ceil_div(cols, 64)) * kInt4StagedWords * sizeof(uint32_t);
}

// Of tensor cores, for 16-bit and fp8 weights. A token's bits depend on the number of warps only, so that the kernel
// for one token and those for several, of either kind, agree where they have as many.
struct OnceConfig {
  int warps;  // that share the input features
  int depth;  // units of 64 bytes of a row that a warp has at most, all in registers
  int tiles;  // of 8 rows a block
  int min_blocks;
};
constexpr OnceConfig kOnceConfigs[] = {
    {8, 8, 1, 4}, {8, 10, 1, 3}, {8, 16, 1, 2}, {16, 8, 1, 2}, {16, 5, 1, 3}, {8, 4, 2, 4}, {8, 5, 2, 3}, {16, 4, 2, 2},
};
struct RingConfig {
  int warps;
  int depth;  // units in flight a warp and tile, in shared memory
  int tiles;
  bool several;  // for several tokens, else for one
};
constexpr RingConfig kRingConfigs[] = {
    {8, 4, 1, false}, {16, 4, 1, false}, {16, 8, 1, false}, {16, 2, 2, false},
    {8, 4, 2, true},  {8, 2, 4, true},   {16, 4, 2, true},  {16, 2, 4, true},
};
// Of several tokens whose x a block keeps for all its rows, beside which it has room for one ring only.
constexpr RingConfig kResidentConfigs[] = {{8, 4, 4, true}, {16, 4, 2, true}};
constexpr int kNumResidentConfigs = sizeof(kResidentConfigs) / sizeof(kResidentConfigs[0]);
constexpr int kNumOnceConfigs = sizeof(kOnceConfigs) / sizeof(kOnceConfigs[0]);
constexpr int kNumRingConfigs = sizeof(kRingConfigs) / sizeof(kRingConfigs[0]);
constexpr int kMaxTensorTokens = 8;  // of one launch
// That a block of 16 warps takes for as many, its static part included: what compute capability 8.0 and 8.7 have. One
// of 8 takes half, which every GPU has.
constexpr std::size_t kSharedBytesOf16Warps = 161 * 1024;

constexpr int kMmaConfigs[] = {1, 2};  // tiles of 16 rows a block
constexpr int kNumMmaConfigs = 2;
constexpr int kMmaRows = 16;
constexpr int kMmaWarps = 8;

}  // namespace edgellm::kernels
