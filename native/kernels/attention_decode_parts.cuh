// What a block of decode attention works with: its parameters, its share of the positions, the rows that it rotates,
// and the sums that blocks merge.
#pragma once

#include "attention_decode_tile.cuh"
#include "edgellm/kernels/attention_decode.hpp"
#include "mbarrier.cuh"

namespace edgellm::kernels {

constexpr int kAttentionWarps = 4;
constexpr int kLongWarps = 8;  // of the blocks of a long sequence
template <int HD>
constexpr bool has_long = HD <= 128;  // wide heads' sums would take too much shared memory
constexpr int kMaxCluster = 8;
constexpr float kNoScore = -1e30f;  // not -inf: the difference of two of them must be a number

struct DecodeAttentionParams {
  const float* qkv;
  void* cache;
  const float* cos;
  const float* sin;
  const bf16* q_gain;
  const bf16* k_gain;
  const int32_t* slots;
  const int32_t* positions;
  bf16* out;
  uint4* exchanged;        // (batch, num_heads, head_dim / 2), zero between calls; or null
  float* partial_out;      // (batch, num_heads, splits, head_dim)
  float2* partial_tops;    // (batch, num_heads, splits): maximum, total
  unsigned int* num_done;  // (batch, gridDim.y, kMaxCluster), zero between calls
  int num_heads;
  int num_kv_heads;
  int capacity;
  int window;
  int most_splits;
  int splits_per_block;  // side by side, of one eight
  int cluster;           // blocks, along x
  float norm_eps;
  float scale;  // times log2(e)
};

__device__ __forceinline__ float fast_exp2(float x) {  // 0 for what is far below
  float y;
  asm("ex2.approx.ftz.f32 %0,%1;" : "=f"(y) : "f"(x));
  return y;
}

// The positions of a block's splits, and the tiles that a warp takes of them. Splits have blocks of 64 in turn, so that
// what a head's blocks read at a time lies together. A long sequence's come in tiles, so that no split has many more
// than another.
template <int kWarps, bool kSeveral>
struct SplitRange {
  int num_splits, last_split, first, end, origin, stride, shift;

  __device__ __forceinline__ SplitRange(const DecodeAttentionParams& p, int position, int first_split, int warp) {
    end = position + 1;
    first = p.window > 0 ? max(0, end - p.window) : 0;
    const bool is_long = kWarps == kLongWarps && end - first > kLongContext;
    const int own = kSeveral ? p.splits_per_block : 1, launched = static_cast<int>(gridDim.x) * own;
    num_splits = min(decode_attention_splits(end - first, p.most_splits), launched);
    last_split = first_split + own - 1;
    shift = is_long ? 4 : 6;
    const int step = is_long ? num_splits * kTilePositions : kTilePositions;
    stride = num_splits * (is_long ? kLongWarps : kAttentionWarps) * kTilePositions;
    // Warps beyond a short sequence's four have no tile.
    origin = warp < kAttentionWarps || is_long ? first + warp * step : end;
  }

  // A warp's tiles of a block's splits, one after the other: the split, and the position that the tile begins with.
  struct Tile {
    int split, base;
  };
  __device__ __forceinline__ bool has(const Tile& tile) const { return tile.base < end; }
  __device__ __forceinline__ Tile first_tile(int first_split) const {
    return skip_empty({first_split, origin + (first_split << shift)});
  }
  __device__ __forceinline__ Tile next_tile(const Tile& tile) const {
    return skip_empty({tile.split, tile.base + stride});
  }
  __device__ __forceinline__ Tile skip_empty(Tile tile) const {
    while (kSeveral && tile.base >= end && tile.split < last_split) tile.base = origin + (++tile.split << shift);
    return tile;
  }
  // Of the block's splits, whether one has `position`, which is the last one.
  __device__ __forceinline__ bool has_last(int position, int first_split) const {
    const int split = ((position - first) >> shift) % num_splits;
    return split >= first_split && split <= last_split;
  }
};

// A block's shared memory: the queries, the warps' sums of each split, and what the blocks of its cluster send it.
// Where a block has one split, nothing of it depends on how many heads there are.
template <int HD, bool kSeveral>
struct DecodeAttentionShared {
  static constexpr int kQueryStride = HD + (12 - HD / 8 % 8) % 8 * 8;  // heads next to each other in other banks
  static constexpr int kQueryBytes = 2 * kTileHeads * kQueryStride * 2;
  int num_warps, num_splits, cluster, num_outs;  // splits: of a block; outs: of its heads

  // Floats that a warp has of a split.
  __host__ __device__ int row() const { return kSeveral ? num_outs : kTileHeads * HD; }
  // Floats that a block merges of each of its cluster's splits: its share of the outputs.
  __host__ __device__ int share() const { return ceil_div(ceil_div(num_outs, cluster), 4) * 4; }
  __host__ __device__ int received() const {
    return kSeveral ? cluster * num_splits * share() : kTileHeads * HD + 4 * kMaxCluster;
  }
  __host__ __device__ int parts() const { return kSeveral ? cluster * num_splits : kMaxCluster; }
  __host__ __device__ int sum_bytes() const { return num_splits * num_warps * row() * 4; }
  __host__ __device__ int top_bytes() const { return num_splits * num_warps * kTileHeads * 8; }
  __host__ __device__ int bytes() const {
    return kQueryBytes + sum_bytes() + top_bytes() + received() * 4 + parts() * kTileHeads * 8;
  }
};

// The rows of qkv that a block rotates, those of its query heads first, and its sequence's position, in shared memory.
// The next kernel's weights may be on their way to the SM already, and what a lane loads comes after them: a copy that
// no lane waits for does not. `arrival` is an mbarrier for it, initialised by thread 0.
struct NewRows {
  float* rows;         // (query heads + 2, head_dim)
  int32_t* positions;  // (4), 16-byte aligned
  uint64_t* arrival;
  const DecodeAttentionParams& p;

  // Of row `row` in qkv.
  __device__ __forceinline__ int source(int row, int first_head, int num_heads, int kv_head) const {
    return row < num_heads    ? first_head + row
           : row == num_heads ? p.num_heads + kv_head
                              : p.num_heads + p.num_kv_heads + kv_head;
  }
  // Gives the position, when all is there.
  template <int HD, int kThreads>
  __device__ __forceinline__ int fetch(int sequence, int first_head, int num_heads, int kv_head) const {
    const float* qkv = p.qkv + static_cast<std::size_t>(sequence) * (p.num_heads + 2 * p.num_kv_heads) * HD;
    const int32_t* position = p.positions + sequence;
#if __CUDA_ARCH__ >= 900
    const auto address = reinterpret_cast<std::uintptr_t>(position);
    if (threadIdx.x == 0) {
      constexpr int kRow = HD * static_cast<int>(sizeof(float));
      mbarrier_expect(arrival, (num_heads + 2) * kRow + 16);
      copy_bulk(positions, reinterpret_cast<const void*>(address & ~std::uintptr_t{15}), 16, arrival);
      copy_bulk(rows, qkv + first_head * HD, num_heads * kRow, arrival);
      for (int row = num_heads; row < num_heads + 2; row++) {
        copy_bulk(rows + row * HD, qkv + source(row, first_head, num_heads, kv_head) * HD, kRow, arrival);
      }
    }
    mbarrier_wait(arrival);
    return positions[address / sizeof(int32_t) % 4];
#else
    for (int j = threadIdx.x; j < (num_heads + 2) * HD; j += kThreads) {
      rows[j] = load_l2(qkv + source(j / HD, first_head, num_heads, kv_head) * HD + j % HD);
    }
    __syncthreads();
    return *static_cast<const volatile int32_t*>(position);
#endif
  }
};

// A row of qkv that a warp rotates: lane i has pairs i and i + 32 of (dim, dim + head_dim / 2).
template <int HD>
struct RopeRow {
  static constexpr int kHalf = HD / 2;
  static constexpr int kPairs = (kHalf + 31) / 32;
  float low[kPairs], high[kPairs], low_gain[kPairs], high_gain[kPairs];

  static __device__ __forceinline__ bool has(int j, int lane) { return lane + 32 * j < kHalf; }

  __device__ __forceinline__ void load(const float* row, const bf16* gain, int lane) {
#pragma unroll
    for (int j = 0; j < kPairs; j++) {
      const int i = lane + 32 * j;
      low[j] = high[j] = 0.0f, low_gain[j] = high_gain[j] = 1.0f;
      if (!has(j, lane)) continue;
      low[j] = row[i], high[j] = row[i + kHalf];
      if (gain) low_gain[j] = __bfloat162float(gain[i]), high_gain[j] = __bfloat162float(gain[i + kHalf]);
    }
  }
  __device__ __forceinline__ void normalise(float eps) {
    float squares = 0.0f;
#pragma unroll
    for (int j = 0; j < kPairs; j++) squares = fmaf(low[j], low[j], fmaf(high[j], high[j], squares));
    const float inverse = rsqrtf(warp_sum(squares) / HD + eps);
#pragma unroll
    for (int j = 0; j < kPairs; j++) low[j] *= inverse * low_gain[j], high[j] *= inverse * high_gain[j];
  }
  __device__ __forceinline__ void rotate(const float* cos, const float* sin) {
#pragma unroll
    for (int j = 0; j < kPairs; j++) {
      const float x = low[j], y = high[j];
      low[j] = x * cos[j] - y * sin[j], high[j] = y * cos[j] + x * sin[j];
    }
  }
};

// Puts v at *p and gives what was there: PTX ISA, atom.exch of 128 bits.
__device__ __forceinline__ uint4 exchange(uint4* p, uint4 v) {
  uint4 old = {};
#if __CUDA_ARCH__ >= 900
  uint64_t low, high;
  asm volatile(
      "{\n.reg .b128 given, found;\nmov.b128 given,{%2,%3};\n"
      "atom.relaxed.gpu.global.exch.b128 found,[%4],given;\nmov.b128 {%0,%1},found;\n}"
      : "=l"(low), "=l"(high)
      : "l"(v.x | static_cast<uint64_t>(v.y) << 32), "l"(v.z | static_cast<uint64_t>(v.w) << 32),
        "l"(__cvta_generic_to_global(p))
      : "memory");
  old = make_uint4(static_cast<uint32_t>(low), static_cast<uint32_t>(low >> 32), static_cast<uint32_t>(high),
                   static_cast<uint32_t>(high >> 32));
#endif
  return old;
}

// Of a zero, those of minus zero.
__device__ __forceinline__ uint32_t nonzero_bits(float v) {
  const uint32_t bits = __float_as_uint(v);
  return bits == 0 ? 0x80000000u : bits;
}

// Sums of outputs that belong to a maximum of scores and a total of weights.
template <int N>
struct Partial {
  float top = kNoScore, total = 0.0f, out[N] = {};

  // `highest` is at least both maxima; the first call finds this empty.
  __device__ __forceinline__ void add(const Partial& part, float highest) {
    const float e = fast_exp2(part.top - highest);
    top = highest;
    total = fmaf(e, part.total, total);
#pragma unroll
    for (int i = 0; i < N; i++) out[i] = fmaf(e, part.out[i], out[i]);
  }
};

}  // namespace edgellm::kernels
