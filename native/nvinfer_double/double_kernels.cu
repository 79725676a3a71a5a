#include <cuda_fp16.h>

#include "../kernels/launch.hpp"
#include "double_kernels.hpp"

namespace edgellm::nvinfer_double {

namespace {

using kernels::launch;
using bf16 = __nv_bfloat16;

constexpr int kThreads = 256;
constexpr int kMaxGemvTokens = kernels::kMaxGemvTokens;

dim3 blocks_for(std::size_t count) { return dim3(static_cast<unsigned>((count + kThreads - 1) / kThreads)); }

__device__ std::size_t thread_index() { return static_cast<std::size_t>(blockIdx.x) * kThreads + threadIdx.x; }

__global__ void prepare_kernel(const PrepareArgs p) {
  const auto i = static_cast<std::int64_t>(thread_index());
  const std::int64_t num_rows = static_cast<std::int64_t>(p.batch) * p.length;
  const auto place = [&](std::int64_t row) {
    const std::int64_t first = p.write_indices[row / p.length], at = first + row % p.length;
    const std::int64_t position = p.positions[row];
    const bool ordered = p.depths != nullptr ? position >= first && position <= at : position == at;
    const bool in_order = first >= 0 && ordered && at < p.capacity && at < p.num_positions;
    return in_order ? static_cast<std::int32_t>(at) : -1;
  };
  if (i < num_rows) {
    p.places[i] = place(i);
    p.slots[i] = static_cast<std::int32_t>(i / p.length);
    if (p.depths != nullptr) {
      p.depths[i] = place(i) < 0 ? 0 : static_cast<std::int32_t>(p.positions[i] - p.write_indices[i / p.length]);
    }
  }
  if (i <= p.batch) p.starts[i] = static_cast<std::int32_t>(i * p.length);
  if (i < p.batch) {
    const std::int64_t first = p.write_indices[i];
    p.sequence_slots[i] = static_cast<std::int32_t>(i);
    p.first_places[i] = first < 0 || first > p.capacity ? 0 : static_cast<std::int32_t>(first);
  }
  if (i < p.num_logits) {
    const std::int64_t row = p.logit_indices[i];
    const bool inside = row >= 0 && row < num_rows;
    p.logit_rows[i] = inside && place(row) >= 0 ? static_cast<std::int32_t>(row) : -1;
  }
  if (i < kMaxGemvTokens) p.ones[i] = 1;
}

__device__ float load(const void* data, bool is_bf16, std::size_t at) {
  return is_bf16 ? __bfloat162float(static_cast<const bf16*>(data)[at])
                 : __half2float(static_cast<const __half*>(data)[at]);
}

// A block a row.
__global__ void check_mask_kernel(const CheckMaskArgs p) {
  const std::int64_t row = blockIdx.x, first = p.write_indices[row / p.length], own = row % p.length;
  if (p.places[row] < 0) {
    if (threadIdx.x == 0 && p.is_tree) p.nodes[row] = std::uint64_t{1} << own;
    return;
  }
  const std::int64_t position = p.positions[row], oldest = p.window > 0 ? position - p.window + 1 : 0;
  __shared__ unsigned long long nodes;
  if (threadIdx.x == 0) nodes = 0;
  __syncthreads();
  bool wrong = false;
  for (std::int64_t place = threadIdx.x; place < p.capacity; place += kThreads) {
    const std::int64_t node = place - first;
    const bool is_new = node >= 0 && node < p.length;
    bool sees = false;
    if (p.mask != nullptr) {
      const float value = load(p.mask, p.is_bf16, static_cast<std::size_t>(row) * p.capacity + place);
      sees = value == 0.0f;
      wrong |= !sees && !(value <= -65504.0f && value >= -65536.0f);
    } else {  // bits are of the new tokens; the engine knows the rest
      sees = is_new ? (static_cast<std::uint64_t>(p.tree_masks[row]) >> node & 1) != 0 : node < 0 && place >= oldest;
    }
    if (p.is_tree && is_new) {
      wrong |= node > own ? sees : node == own && !sees;
      // A mask has its window in it along a path too; bits leave that to the engine.
      wrong |= p.mask != nullptr && sees && p.positions[row - own + node] < oldest;
      if (sees) atomicOr(&nodes, 1ULL << node);
    } else {
      wrong |= sees != (place <= position && place >= oldest);
    }
  }
  wrong = __syncthreads_or(wrong) != 0;
  if (threadIdx.x != 0) return;
  if (wrong) p.places[row] = -1;
  if (p.is_tree) p.nodes[row] = nodes | 1ULL << own;
}

__global__ void drop_rows_kernel(const std::int32_t* places, std::int32_t* logit_rows, int num_logits) {
  const auto i = static_cast<int>(thread_index());
  if (i < num_logits && logit_rows[i] >= 0 && places[logit_rows[i]] < 0) logit_rows[i] = -1;
}

__global__ void embed_kernel(const void* embeds, bool is_bf16, std::size_t count, float* residual,
                             bf16* residual_bf16) {
  const std::size_t i = thread_index();
  if (i >= count) return;
  const float value = load(embeds, is_bf16, i);
  residual[i] = value;
  residual_bf16[i] = __float2bfloat16(value);
}

__global__ void gather_rows_kernel(const bf16* x, const std::int32_t* rows, int width, bf16* out) {
  const std::size_t column = thread_index();
  if (column >= width) return;
  const std::int32_t row = rows[blockIdx.y];
  const bf16 value = row < 0 ? __float2bfloat16(0.0f) : x[static_cast<std::size_t>(row) * width + column];
  out[static_cast<std::size_t>(blockIdx.y) * width + column] = value;
}

// Elements travel as bits.
template <class Element>
__global__ void store_new_kernel(const StoreArgs p, Element mark) {
  const std::size_t i = thread_index();
  const auto head_dim = static_cast<std::size_t>(p.kv.head_dim), heads = static_cast<std::size_t>(p.kv.num_kv_heads);
  const std::size_t dim = i % head_dim, head = i / head_dim % heads, row = i / (head_dim * heads);
  if (row >= static_cast<std::size_t>(p.batch) * p.length) return;
  const std::size_t sequence = row / p.length;
  const std::int64_t at = p.write_indices[sequence] + static_cast<std::int64_t>(row % p.length);
  if (at < 0 || at >= p.kv.capacity) return;
  const std::size_t head_size = static_cast<std::size_t>(p.kv.capacity) * head_dim;
  const std::size_t inside = static_cast<std::size_t>(at) * head_dim + dim;
  const auto* key = static_cast<const Element*>(p.kv.data) + (sequence * 2 * heads + head) * head_size + inside;
  const std::size_t to = sequence * p.slot_elements + head * head_size + inside;
  const bool padding = p.places[row] < 0;
  static_cast<Element*>(p.keys)[to] = padding ? mark : *key;
  static_cast<Element*>(p.values)[to] = padding ? mark : key[heads * head_size];
}

__global__ void pack_lora_kernel(const PackLoraArgs p) {
  const std::size_t i = thread_index();
  const int padded = kernels::padded_lora_rank(p.rank);
  const auto wide = static_cast<std::size_t>(padded), in = static_cast<std::size_t>(p.in);
  if (i < wide * in) {
    const std::size_t r = i / in, column = i % in;
    p.a[i] = __float2bfloat16(r < p.rank ? load(p.bound_a, p.is_bf16, column * p.rank + r) : 0.0f);
  }
  if (i < wide * p.out) {
    const std::size_t row = i / wide, r = i % wide;
    p.b[i] = __float2bfloat16(r < p.rank ? load(p.bound_b, p.is_bf16, r * p.out + row) : 0.0f);
  }
  if (i > 0) return;
  kernels::LoraLinear entry;
  entry.a = p.a;
  entry.b = p.b;
  entry.num_a_rows = padded;
  entry.rank[0] = static_cast<std::uint8_t>(padded);
  entry.num_b = padded * p.out;
  *p.entry = entry;
}

__global__ void count_execution_kernel(std::uint32_t* executions, std::int64_t trap) {
  if (++*executions == trap) __trap();
}

__global__ void spoil_logits_kernel(const std::int32_t* logit_rows, int width, const std::uint32_t* executions,
                                    std::int64_t nan_from, float* logits) {
  const bool spoiled = logit_rows[blockIdx.y] < 0 || (nan_from > 0 && *executions >= nan_from);
  const std::size_t column = thread_index();
  if (!spoiled || column >= width) return;
  logits[static_cast<std::size_t>(blockIdx.y) * width + column] = __int_as_float(0x7fc00000);
}

}  // namespace

void prepare_async(const PrepareArgs& args, cudaStream_t stream) {
  const std::size_t rows = static_cast<std::size_t>(args.batch) * args.length;
  const std::size_t most = rows + static_cast<std::size_t>(args.batch + args.num_logits + kMaxGemvTokens);
  launch(prepare_kernel, blocks_for(most), dim3(kThreads), 0, stream, false, args);
}

void check_mask_async(const CheckMaskArgs& args, cudaStream_t stream) {
  launch(check_mask_kernel, dim3(args.batch * args.length), dim3(kThreads), 0, stream, false, args);
}

void drop_rows_async(const std::int32_t* places, std::int32_t* logit_rows, int num_logits, cudaStream_t stream) {
  launch(drop_rows_kernel, blocks_for(static_cast<std::size_t>(num_logits)), dim3(kThreads), 0, stream, false, places,
         logit_rows, num_logits);
}

void embed_async(const void* embeds, bool is_bf16, std::size_t count, float* residual, bf16* residual_bf16,
                 cudaStream_t stream) {
  launch(embed_kernel, blocks_for(count), dim3(kThreads), 0, stream, false, embeds, is_bf16, count, residual,
         residual_bf16);
}

void gather_rows_async(const bf16* x, const std::int32_t* rows, int num_rows, int width, bf16* out,
                       cudaStream_t stream) {
  dim3 grid = blocks_for(static_cast<std::size_t>(width));
  grid.y = static_cast<unsigned>(num_rows);
  launch(gather_rows_kernel, grid, dim3(kThreads), 0, stream, false, x, rows, width, out);
}

void store_new_async(const StoreArgs& args, cudaStream_t stream) {
  const std::size_t count =
      static_cast<std::size_t>(args.batch) * args.length * args.kv.num_kv_heads * args.kv.head_dim;
  if (args.kv.format == kernels::KvFormat::fp8) {
    constexpr std::uint8_t kLargest = 0x7e;  // 448
    launch(store_new_kernel<std::uint8_t>, blocks_for(count), dim3(kThreads), 0, stream, false, args, kLargest);
    return;
  }
  const std::uint16_t mark = args.kv.format == kernels::KvFormat::bf16
                                 ? __nv_bfloat16_raw(__float2bfloat16(kPaddingMark)).x
                                 : __half_raw(__float2half(kPaddingMark)).x;
  launch(store_new_kernel<std::uint16_t>, blocks_for(count), dim3(kThreads), 0, stream, false, args, mark);
}

void pack_lora_async(const PackLoraArgs& args, cudaStream_t stream) {
  const std::size_t widest = static_cast<std::size_t>(args.in > args.out ? args.in : args.out);
  launch(pack_lora_kernel, blocks_for(widest * kernels::padded_lora_rank(args.rank)), dim3(kThreads), 0, stream, false,
         args);
}

void count_execution_async(std::uint32_t* executions, std::int64_t trap, cudaStream_t stream) {
  launch(count_execution_kernel, dim3(1), dim3(1), 0, stream, false, executions, trap);
}

void spoil_logits_async(const std::int32_t* logit_rows, int num_logits, int width, const std::uint32_t* executions,
                        std::int64_t nan_from, float* logits, cudaStream_t stream) {
  dim3 grid = blocks_for(static_cast<std::size_t>(width));
  grid.y = static_cast<unsigned>(num_logits);
  launch(spoil_logits_kernel, grid, dim3(kThreads), 0, stream, false, logit_rows, width, executions, nan_from, logits);
}

}  // namespace edgellm::nvinfer_double
