// What tree attention brings into shared memory: tiles of the prefix, and the new tokens' rotated rows.
#pragma once

#include "cluster.cuh"
#include "copy_async.cuh"
#include "edgellm/kernels/attention_tree.hpp"
#include "kv_format.cuh"

namespace edgellm::kernels {

constexpr int kTreeWarps = 4;
constexpr int kTreeThreads = kTreeWarps * 32;
template <int HD>
constexpr int kTreeTile = HD > 128 ? 32 : 64;   // positions
constexpr int kTreeCluster = 8;                 // blocks, where the GPU has clusters
constexpr int kTreeTilesToSplit = 2;            // tiles a block, below which one more split costs more than it saves
constexpr std::size_t kTreeStaticBytes = 2048;  // at most, beside TreeShared: masks, depths, sums
constexpr float kTreeNoScore = -1e30f;          // finite, so that a row without scores yet gives no NaN

// Chunks of rows that the workspace has counters for: a head has one for each 64 of a sequence's tokens, or for each 32
// of those of a wide head. Engines that were built with the plugin have that size in them.
constexpr int most_tree_chunks(int num_heads, int head_dim) {
  return kMaxTreeSequences * num_heads * (head_dim > 128 ? 2 : 1);
}

struct TreeAttentionParams {
  const float* qkv;
  void* cache;
  const float* cos;
  const float* sin;
  const bf16* q_gain;
  const bf16* k_gain;
  const int32_t* starts;
  const int32_t* slots;
  const int32_t* positions;
  const int32_t* depths;
  const uint64_t* masks;
  bf16* out;
  float* partial_out;      // (num_tokens, num_heads, splits, head_dim)
  float* partial_max;      // (num_tokens, num_heads, splits)
  float* partial_sum;      // (num_tokens, num_heads, splits)
  unsigned int* num_done;  // (num_sequences, gridDim.y, cluster_size), zero between calls
  int num_heads;
  int num_kv_heads;
  int capacity;
  int window;
  int splits;
  int cluster_size;  // kTreeCluster, or 1
  float norm_eps;
  float scale;  // times log2(e)
};

// How the cache's numbers become the 16-bit operands of the products.
template <KvFormat F>
struct TreeOperand {
  using Element = typename Kv<F>::Element;
  static constexpr bool kRaw = F == KvFormat::fp8;  // tiles arrive as the cache has them and are converted afterwards

  static __device__ __forceinline__ uint32_t pack(float low, float high) {
    if constexpr (F == KvFormat::fp16) {
      return bits_as<uint32_t>(__halves2half2(Kv<F>::from_float(low), Kv<F>::from_float(high)));
    } else {
      return pack_bf16(low, high);
    }
  }
  static __device__ __forceinline__ void mma(float* d, const uint32_t* a, uint32_t b0, uint32_t b1) {
    if constexpr (F == KvFormat::fp16) {
      mma_fp16(d, a, b0, b1);
    } else {
      mma_bf16(d, a, b0, b1);
    }
  }
  // Eight numbers of the cache as operands.
  static __device__ __forceinline__ uint4 convert(const typename Kv<F>::Eight& eight) {
    if constexpr (!kRaw) {
      return eight;
    } else {
      float v[8];
      Kv<F>::unpack(eight, v);
      return make_uint4(pack(v[0], v[1]), pack(v[2], v[3]), pack(v[4], v[5]), pack(v[6], v[7]));
    }
  }
  // Four numbers into the cache (unless `to` is null), and as the operands that a reader of the cache would get.
  static __device__ __forceinline__ uint2 store_four(Element* to, const float4& v) {
    if constexpr (!kRaw) {
      const uint2 four = make_uint2(pack(v.x, v.y), pack(v.z, v.w));
      if (to) *reinterpret_cast<uint2*>(to) = four;
      return four;
    } else {
      const uint32_t low = Kv<F>::from_float(v.x) | static_cast<uint32_t>(Kv<F>::from_float(v.y)) << 8;
      const uint32_t high = Kv<F>::from_float(v.z) | static_cast<uint32_t>(Kv<F>::from_float(v.w)) << 8;
      if (to) *reinterpret_cast<uint32_t*>(to) = low | high << 16;
      const float2 xy = unpack_fp16(fp8x2_to_fp16x2(low)), zw = unpack_fp16(fp8x2_to_fp16x2(high));
      constexpr float kUnscale = 1.0f / kFp8ToFp16;
      return make_uint2(pack(xy.x * kUnscale, xy.y * kUnscale), pack(zw.x * kUnscale, zw.y * kUnscale));
    }
  }
};

__device__ __forceinline__ void tree_load_matrices(uint32_t* r, const bf16* p) {
  const uint32_t from = shared_address(p);
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3},[%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(from)
               : "memory");
}
__device__ __forceinline__ void tree_load_matrices_transposed(uint32_t* r, const bf16* p) {
  const uint32_t from = shared_address(p);
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3},[%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(from)
               : "memory");
}

// Over the blocks of a cluster, or over the block.
__device__ __forceinline__ void tree_barrier(int cluster_size) {
  if (cluster_size > 1) {
    cluster_barrier();
  } else {
    __syncthreads();
  }
}
// Shared memory of the cluster's block `rank`; `T` is float or float4.
template <class T>
__device__ __forceinline__ T tree_load_peer(const T* p, int rank, int cluster_size) {
  return cluster_size > 1 ? load_from_cluster(p, rank) : *p;
}

// Shared memory of a block: tiles in the operands' format, tiles as the cache has them, and the rotated queries.
template <int HD, KvFormat F>
struct TreeShared {
  static constexpr int kStride = HD + 8;       // elements a row: ldmatrix, and fp32 pairs, without bank conflicts
  static constexpr int kTile = kTreeTile<HD>;  // positions
  static constexpr int kTileElements = 2 * kTile * kStride;  // keys, then values
  static constexpr bool kRaw = TreeOperand<F>::kRaw;
  // As many as leave two blocks an SM, and one on GPUs with 99 KiB a block.
  static constexpr int kStages = HD > 128 ? 2 : kRaw ? 3 : HD <= 64 ? 4 : HD <= 96 ? 3 : 2;
  static constexpr int kTiles = kRaw ? 1 : kStages;
  static constexpr std::size_t kTileBytes = std::size_t{kTileElements} * sizeof(bf16);
  static constexpr std::size_t kRawBytes = kRaw ? std::size_t{2} * kTile * HD : 0;
  static constexpr std::size_t kRawStart = kTiles * kTileBytes;
  static constexpr std::size_t kQueryStart = kRawStart + (kRaw ? kStages * kRawBytes : 0);
  static constexpr std::size_t bytes(int rows) { return kQueryStart + std::size_t(rows) * kStride * sizeof(bf16); }
  // The merge's fp32 rows, 16 a warp, lie over the tiles, and where queries are read in every tile, over those too.
  static constexpr std::size_t kMergeBytes = std::size_t{16} * kTreeWarps * kStride * sizeof(float);
};

// Starts copying the positions of a tile that are of the prefix; new tokens' rows (prefix to end - 1) are left to
// TreeRows, those from `end` on are zeros.
template <int HD, KvFormat F>
__device__ __forceinline__ void tree_fetch(unsigned char* shared, int stage, const typename Kv<F>::Element* keys,
                                           const typename Kv<F>::Element* values, int tile, int prefix, int end) {
  using Shared = TreeShared<HD, F>;
  constexpr int kPerCopy = 16 / sizeof(typename Kv<F>::Element);
  constexpr int kChunks = HD / kPerCopy, kCopies = ceil_div(Shared::kTile * kChunks, kTreeThreads);
#pragma unroll
  for (int i = 0; i < kCopies; i++) {
    const int index = i * kTreeThreads + threadIdx.x, row = index / kChunks, column = index % kChunks * kPerCopy;
    const int at = tile + row;
    if (row >= Shared::kTile || (at >= prefix && at < end)) continue;
    const std::size_t from = static_cast<std::size_t>(at < prefix ? at : 0) * HD + column;
    if constexpr (Shared::kRaw) {
      unsigned char* key = shared + Shared::kRawStart + stage * Shared::kRawBytes + row * HD + column;
      copy_async16(key, keys + from, at < prefix);
      copy_async16(key + Shared::kTile * HD, values + from, at < prefix);
    } else {
      bf16* key = reinterpret_cast<bf16*>(shared) + stage * Shared::kTileElements + row * Shared::kStride + column;
      copy_async16(key, keys + from, at < prefix);
      copy_async16(key + Shared::kTile * Shared::kStride, values + from, at < prefix);
    }
  }
}

// This thread's share of a raw tile into the operands' format, but for the new tokens' rows.
template <int HD, KvFormat F>
__device__ __forceinline__ void tree_convert(unsigned char* shared, int stage, int tile, int prefix, int end) {
  using Shared = TreeShared<HD, F>;
  using Eight = typename Kv<F>::Eight;
  const unsigned char* raw = shared + Shared::kRawStart + stage * Shared::kRawBytes;
  bf16* to = reinterpret_cast<bf16*>(shared);
  constexpr int kChunks = HD / 8;
  for (int i = threadIdx.x; i < 2 * Shared::kTile * kChunks; i += kTreeThreads) {
    const int row = i / kChunks, column = i % kChunks * 8, at = tile + row % Shared::kTile;
    if (at >= prefix && at < end) continue;
    const Eight eight = *reinterpret_cast<const Eight*>(raw + (row * HD + column) * sizeof(typename Kv<F>::Element));
    *reinterpret_cast<uint4*>(to + row * Shared::kStride + column) = TreeOperand<F>::convert(eight);
  }
}

// Rows of qkv on their way into shared memory: queries, keys and values of new tokens.
template <int HD, KvFormat F>
struct TreeRows {
  using Element = typename Kv<F>::Element;
  static constexpr int kHalf = HD / 2;
  static constexpr int kLanes = kHalf > 64 ? 32 : 16;  // of a row
  static constexpr int kBatch = kHalf > 64 ? 2 : 4;    // rows in flight
  static constexpr int kRowsAtOnce = kTreeThreads / kLanes;
  static constexpr int kStride = TreeShared<HD, F>::kStride;

  const TreeAttentionParams& p;
  const int32_t* depths;  // (kMaxTreeTokens), in shared memory
  Element* keys;
  Element* values;
  bf16* queries;  // (rows, kStride)
  int first_token, kv_head, group, first_row, num_rows, prefix;
  bool writes_cache;

  // The queries of the chunk's first `num_queries` rows, and keys and values of new tokens first_new to last_new - 1,
  // whose rows in the tile begin at `tile_rows` for position `tile`. Half a warp has a row, or a whole one if the
  // head is wide; a lane has four dims and their counterparts half a head away.
  __device__ __forceinline__ void load(int num_queries, int first_new, int last_new, bf16* tile_rows, int tile) const {
    const int row_of_lanes = threadIdx.x / kLanes, dim = (threadIdx.x % kLanes) * 4;
    const bool has_dims = dim < kHalf;
    const int num_new = max(0, last_new - first_new), num_jobs = num_queries + 2 * num_new;
    const int width = (p.num_heads + 2 * p.num_kv_heads) * HD;
    for (int first = 0; first < num_jobs; first += kBatch * kRowsAtOnce) {
      float4 low[kBatch], high[kBatch], cos[kBatch], sin[kBatch];
#pragma unroll
      for (int i = 0; i < kBatch; i++) {
        const int job = first + i * kRowsAtOnce + row_of_lanes;
        low[i] = high[i] = sin[i] = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
        cos[i] = make_float4(1.0f, 1.0f, 1.0f, 1.0f);
        if (job >= num_jobs || !has_dims) continue;
        const int fresh = job - num_queries, row = first_row + job;
        const bool is_query = fresh < 0, is_value = fresh >= num_new;
        const int token =
            is_query ? min(row / group, num_rows / group - 1) : first_new + (is_value ? fresh - num_new : fresh);
        const int head = is_query   ? kv_head * group + row % group
                         : is_value ? p.num_heads + p.num_kv_heads + kv_head
                                    : p.num_heads + kv_head;
        const float* from = p.qkv + static_cast<std::size_t>(first_token + token) * width + head * HD + dim;
        low[i] = __ldcg(reinterpret_cast<const float4*>(from));
        high[i] = __ldcg(reinterpret_cast<const float4*>(from + kHalf));
        if (is_value) continue;
        const std::size_t angle = static_cast<std::size_t>(prefix + depths[token]) * kHalf + dim;
        cos[i] = __ldg(reinterpret_cast<const float4*>(p.cos + angle));
        sin[i] = __ldg(reinterpret_cast<const float4*>(p.sin + angle));
      }
#pragma unroll
      for (int i = 0; i < kBatch; i++) {
        const int job = first + i * kRowsAtOnce + row_of_lanes, fresh = job - num_queries;
        const bool is_query = fresh < 0, is_value = fresh >= num_new;
        float4 x = low[i], y = high[i];
        if (p.q_gain) normalise(x, y, is_query ? p.q_gain : p.k_gain, is_value, dim, has_dims);
        if (job >= num_jobs || !has_dims) continue;
        const float4 c = cos[i], s = sin[i];
        const float4 first_half =
            make_float4(x.x * c.x - y.x * s.x, x.y * c.y - y.y * s.y, x.z * c.z - y.z * s.z, x.w * c.w - y.w * s.w);
        const float4 second_half =
            make_float4(y.x * c.x + x.x * s.x, y.y * c.y + x.y * s.y, y.z * c.z + x.z * s.z, y.w * c.w + x.w * s.w);
        if (is_query) {
          bf16* to = queries + job * kStride + dim;
          *reinterpret_cast<uint2*>(to) = four(first_half);
          *reinterpret_cast<uint2*>(to + kHalf) = four(second_half);
          continue;
        }
        const int at = prefix + first_new + (is_value ? fresh - num_new : fresh);
        Element* cached = (is_value ? values : keys) + static_cast<std::size_t>(at) * HD + dim;
        bf16* to = tile_rows + ((is_value ? kTreeTile<HD> : 0) + at - tile) * kStride + dim;
        *reinterpret_cast<uint2*>(to) = TreeOperand<F>::store_four(writes_cache ? cached : nullptr, first_half);
        *reinterpret_cast<uint2*>(to + kHalf) =
            TreeOperand<F>::store_four(writes_cache ? cached + kHalf : nullptr, second_half);
      }
    }
  }

 private:
  static __device__ __forceinline__ uint2 four(const float4& v) {
    return make_uint2(TreeOperand<F>::pack(v.x, v.y), TreeOperand<F>::pack(v.z, v.w));
  }

  // The RMSNorm of a query or key head; by whole warps.
  __device__ __forceinline__ void normalise(float4& x, float4& y, const bf16* gain, bool is_value, int dim,
                                            bool has_dims) const {
    float squares = fmaf(x.x, x.x, fmaf(x.y, x.y, fmaf(x.z, x.z, x.w * x.w)));
    squares += fmaf(y.x, y.x, fmaf(y.y, y.y, fmaf(y.z, y.z, y.w * y.w)));
#pragma unroll
    for (int s = kLanes / 2; s >= 1; s >>= 1) squares += __shfl_xor_sync(kAllLanes, squares, s);
    if (is_value || !has_dims) return;
    const float inverse = rsqrtf(squares / static_cast<float>(HD) + p.norm_eps);
    const uint2 low = __ldg(reinterpret_cast<const uint2*>(gain + dim));
    const uint2 high = __ldg(reinterpret_cast<const uint2*>(gain + kHalf + dim));
    x.x *= inverse * low_float(low.x), x.y *= inverse * high_float(low.x);
    x.z *= inverse * low_float(low.y), x.w *= inverse * high_float(low.y);
    y.x *= inverse * low_float(high.x), y.y *= inverse * high_float(high.x);
    y.z *= inverse * low_float(high.y), y.w *= inverse * high_float(high.y);
  }
};

}  // namespace edgellm::kernels
