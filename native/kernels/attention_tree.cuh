// Tree attention of one head_dim: RoPE, KV write, and a softmax over prefix and tree, split over the sequence.
//
// A block has one sequence, one KV head, a chunk of rows and a share of the positions; a row is a (token, query head of
// the group) pair, so that the prefix is read once for all tokens and grouped heads. It runs over tiles of 64 positions
// on mma.m16n8k16, the last tile first: that one has the new tokens, whose keys the block rotates itself while the
// prefix's tiles are on their way. Four warps share the chunk's rows, or, where there are few, each tile's positions.
// Blocks are merged through the shared memory of a cluster of eight, clusters through global memory by the one that
// finishes last.
#pragma once

#include <stdexcept>
#include <string>

#include "attention_tree_rows.cuh"
#include "launch.hpp"

namespace edgellm::kernels {

// kRowGroups warps have 16 rows each; the others share their tiles' positions with them.
template <int HD, KvFormat F, int kRowGroups>
__global__ void __launch_bounds__(kTreeThreads, 2) tree_attention_kernel(const TreeAttentionParams p) {
  using Shared = TreeShared<HD, F>;
  using Operand = TreeOperand<F>;
  using Element = typename Kv<F>::Element;
  constexpr int kRows = 16 * kRowGroups, kParts = kTreeWarps / kRowGroups, kStride = Shared::kStride;
  constexpr int kTile = Shared::kTile;
  constexpr int kSteps = HD / 16, kOutTiles = HD / 8;
  constexpr int kPositions = kTile / kParts, kScoreTiles = kPositions / 8;  // of a warp in a tile
  // Beside the sums of a wide head there are no registers for the queries.
  constexpr bool kSharedQueries = HD > 128;
  static_assert(kPositions % 16 == 0);
  extern __shared__ uint4 shared_memory[];
  __shared__ uint64_t masks[kMaxTreeTokens];
  __shared__ int32_t depths[kMaxTreeTokens];
  __shared__ float warp_max[kParts][kRows], warp_total[kParts][kRows], block_max[kRows], block_total[kRows];
  __shared__ unsigned int order;
  unsigned char* shared = reinterpret_cast<unsigned char*>(shared_memory);
  bf16* queries = reinterpret_cast<bf16*>(shared + Shared::kQueryStart);

  const int tid = threadIdx.x, lane = tid & 31, warp = tid >> 5, g = lane >> 2, t = lane & 3;
  const int row_group = warp % kRowGroups, part = warp / kRowGroups;
  const int rank = static_cast<int>(blockIdx.x) % p.cluster_size, unit = static_cast<int>(blockIdx.x) / p.cluster_size;
  const int sequence = blockIdx.z, group = p.num_heads / p.num_kv_heads;
  const int kv_head = static_cast<int>(blockIdx.y) % p.num_kv_heads;
  const int first_row = static_cast<int>(blockIdx.y) / p.num_kv_heads * kRows;
  const int first_token = p.starts[sequence], num_tokens = p.starts[sequence + 1] - first_token;
  const int prefix = p.positions[sequence], end = prefix + num_tokens, num_rows = num_tokens * group;

  // Tiles from `begin` on; each active unit has a fair share, and of that each of its blocks.
  const int begin = p.window > 0 ? max(0, prefix - p.window + 1) / kTile * kTile : 0;
  const int num_tiles = ceil_div(end - begin, kTile);
  const int units = min(p.splits, max(1, num_tiles / (p.cluster_size * kTreeTilesToSplit)));
  const bool works = prefix >= 0 && num_tokens >= 1 && num_tokens <= kMaxTreeTokens && end <= p.capacity &&
                     first_row < num_rows && unit < units;  // the same in all blocks of a cluster
  const int shares = units * p.cluster_size, share = unit * p.cluster_size + rank;
  const int first_tile = works ? num_tiles * share / shares : 0;
  const int last_tile = works ? num_tiles * (share + 1) / shares : 0;  // past the end

  const std::size_t head_size = static_cast<std::size_t>(p.capacity) * HD;
  Element* keys = static_cast<Element*>(p.cache);
  Element* values = keys;
  if (works) {
    keys += (static_cast<std::size_t>(p.slots[sequence]) * 2 * p.num_kv_heads + kv_head) * head_size;
    values = keys + p.num_kv_heads * head_size;
  }
  const int count = last_tile - first_tile;
  // The i-th tile's first position: from the last tile down.
  const auto tile_at = [&](int i) { return begin + (last_tile - 1 - i) * kTile; };
#pragma unroll
  for (int i = 0; i < Shared::kStages - 1; i++) {
    if (i < count) tree_fetch<HD, F>(shared, i, keys, values, tile_at(i), prefix, end);
    commit_copies();
  }
  if (works && tid < num_tokens) {
    masks[tid] = p.masks[first_token + tid];
    depths[tid] = p.depths[first_token + tid];
  }
  start_dependents();
  wait_for_predecessor();
  if (!works) return;
  __syncthreads();  // masks and depths

  const TreeRows<HD, F> rows = {p,       depths, keys,      values,   queries, first_token,
                                kv_head, group,  first_row, num_rows, prefix,  first_row == 0};
  // Keys and values of the new tokens in the i-th tile.
  const auto load_new = [&](int num_queries, int i) {
    const int tile = tile_at(i);
    bf16* tile_rows =
        reinterpret_cast<bf16*>(shared) + (Shared::kRaw ? 0 : i % Shared::kStages) * Shared::kTileElements;
    rows.load(num_queries, max(tile - prefix, 0), min(tile + kTile, end) - prefix, tile_rows, tile);
  };
  const bool starts_new = count > 0 && tile_at(0) + kTile > prefix;
  if (starts_new) {
    load_new(kRows, 0);
  } else if (count > 0) {
    rows.load(kRows, 0, 0, nullptr, 0);
  }
  __syncthreads();

  uint64_t mask[2];  // of rows g and g + 8
  int depth[2];
#pragma unroll
  for (int i = 0; i < 2; i++) {
    const int token = min((first_row + row_group * 16 + g + 8 * i) / group, num_tokens - 1);
    mask[i] = masks[token], depth[i] = depths[token];
  }
  uint32_t q[kSharedQueries ? 1 : kSteps][4];
  const bf16* own_queries = queries + (row_group * 16 + (lane & 7) + 8 * ((lane >> 3) & 1)) * kStride + 8 * (lane >> 4);
  if constexpr (!kSharedQueries) {
#pragma unroll
    for (int s = 0; s < kSteps; s++) {
      if (count > 0) tree_load_matrices(q[s], own_queries + s * 16);
    }
  }
  float out[kOutTiles][4] = {};
  float top[2] = {kTreeNoScore, kTreeNoScore}, total[2] = {};

  for (int i = 0; i < count; i++) {
    const int tile = tile_at(i);
    const bool has_new = tile + kTile > prefix;
    wait_for_copies<Shared::kStages - 2>();
    if constexpr (Shared::kRaw) {
      __syncthreads();  // the copies of all threads are there, and all warps are done with the tile before
      tree_convert<HD, F>(shared, i % Shared::kStages, tile, prefix, end);
    }
    // The first tile's are there already. Nobody reads this stage any more: all have passed the last barrier.
    if (has_new && i > 0) load_new(0, i);
    __syncthreads();
    if (i + Shared::kStages - 1 < count) {
      const int next = i + Shared::kStages - 1;
      tree_fetch<HD, F>(shared, next % Shared::kStages, keys, values, tile_at(next), prefix, end);
    }
    commit_copies();
    const bf16* key_tile = reinterpret_cast<const bf16*>(shared) +
                           (Shared::kRaw ? 0 : i % Shared::kStages) * Shared::kTileElements +
                           part * kPositions * kStride;
    const bf16* value_tile = key_tile + kTile * kStride;

    float scores[kScoreTiles][4] = {};
#pragma unroll
    for (int s = 0; s < kSteps; s++) {
      uint32_t (&a)[4] = q[kSharedQueries ? 0 : s];
      if constexpr (kSharedQueries) tree_load_matrices(a, own_queries + s * 16);
#pragma unroll
      for (int n = 0; n < kScoreTiles; n += 2) {
        uint32_t b[4];
        tree_load_matrices(
            b, key_tile + (n * 8 + (lane >> 4) * 8 + (lane & 7)) * kStride + s * 16 + ((lane >> 3) & 1) * 8);
        Operand::mma(scores[n], a, b[0], b[1]);
        Operand::mma(scores[n + 1], a, b[2], b[3]);
      }
    }
    const bool masked = has_new || (p.window > 0 && tile < end - p.window);
    float higher[2] = {top[0], top[1]};
#pragma unroll
    for (int n = 0; n < kScoreTiles; n++) {
#pragma unroll
      for (int e = 0; e < 4; e++) {
        float score = scores[n][e] * p.scale;
        if (masked) {
          const int at = tile + part * kPositions + n * 8 + 2 * t + (e & 1), fresh = at - prefix;
          bool visible = fresh < 0;
          int distance = depth[e >> 1] - fresh;  // along the path, for the window
          if (fresh >= 0 && fresh < num_tokens) {
            visible = mask[e >> 1] >> fresh & 1;
            distance = depth[e >> 1] - depths[fresh];
          }
          if (!visible || (p.window > 0 && distance >= p.window)) score = -INFINITY;
        }
        scores[n][e] = score;
        higher[e >> 1] = fmaxf(higher[e >> 1], score);
      }
    }
#pragma unroll
    for (int r = 0; r < 2; r++) {
      higher[r] = fmaxf(higher[r], __shfl_xor_sync(kAllLanes, higher[r], 1));
      higher[r] = fmaxf(higher[r], __shfl_xor_sync(kAllLanes, higher[r], 2));
      const float shrink = exp2f(top[r] - higher[r]);
      top[r] = higher[r];
      total[r] *= shrink;
#pragma unroll
      for (int d = 0; d < kOutTiles; d++) out[d][2 * r] *= shrink, out[d][2 * r + 1] *= shrink;
    }
#pragma unroll
    for (int n = 0; n < kScoreTiles; n++) {
#pragma unroll
      for (int e = 0; e < 4; e++) {
        scores[n][e] = exp2f(scores[n][e] - top[e >> 1]);
        total[e >> 1] += scores[n][e];
      }
    }
#pragma unroll
    for (int s = 0; s < kPositions / 16; s++) {
      const uint32_t a[4] = {Operand::pack(scores[2 * s][0], scores[2 * s][1]),
                             Operand::pack(scores[2 * s][2], scores[2 * s][3]),
                             Operand::pack(scores[2 * s + 1][0], scores[2 * s + 1][1]),
                             Operand::pack(scores[2 * s + 1][2], scores[2 * s + 1][3])};
#pragma unroll
      for (int d = 0; d < kOutTiles; d += 2) {
        uint32_t b[4];
        tree_load_matrices_transposed(
            b, value_tile + (s * 16 + ((lane >> 3) & 1) * 8 + (lane & 7)) * kStride + d * 8 + (lane >> 4) * 8);
        Operand::mma(out[d], a, b[0], b[1]);
        Operand::mma(out[d + 1], a, b[2], b[3]);
      }
    }
  }

  // The warps' sums into shared memory, over the tiles.
  static_assert(Shared::kMergeBytes <= (kSharedQueries ? Shared::bytes(kRows) : Shared::kTileBytes));
  wait_for_copies<0>();
  __syncthreads();
  float* partial = reinterpret_cast<float*>(shared);  // (kParts, kRows, kStride)
#pragma unroll
  for (int r = 0; r < 2; r++) {
    total[r] += __shfl_xor_sync(kAllLanes, total[r], 1);
    total[r] += __shfl_xor_sync(kAllLanes, total[r], 2);
    const int row = row_group * 16 + g + 8 * r;
    if (t == 0) warp_max[part][row] = top[r], warp_total[part][row] = total[r];
#pragma unroll
    for (int d = 0; d < kOutTiles; d++) {
      *reinterpret_cast<float2*>(partial + (part * kRows + row) * kStride + d * 8 + 2 * t) =
          make_float2(out[d][2 * r], out[d][2 * r + 1]);
    }
  }
  __syncthreads();
  for (int j = tid; j < kRows * HD; j += kTreeThreads) {
    const int row = j / HD, d = j % HD;
    float highest = kTreeNoScore, sum = 0.0f, o = 0.0f;
#pragma unroll
    for (int w = 0; w < kParts; w++) highest = fmaxf(highest, warp_max[w][row]);
#pragma unroll
    for (int w = 0; w < kParts; w++) {
      const float e = exp2f(warp_max[w][row] - highest);
      sum = fmaf(e, warp_total[w][row], sum);
      o = fmaf(e, partial[(w * kRows + row) * kStride + d], o);
    }
    partial[row * kStride + d] = o;  // nobody else reads what this thread has read
    if (d == 0) block_max[row] = highest, block_total[row] = sum;
  }
  tree_barrier(p.cluster_size);

  // Each block of the cluster has a slice of the rows, four elements at a time.
  static_assert(kRows % kTreeCluster == 0);
  const int fours = kRows * HD / 4 / p.cluster_size;
  const auto place = [&](int row, std::size_t& at) {  // whether the chunk's row is real, and its place among all
    const int of_sequence = first_row + row;
    if (of_sequence >= num_rows) return false;
    at = static_cast<std::size_t>(first_token + of_sequence / group) * p.num_heads + kv_head * group +
         of_sequence % group;
    return true;
  };
  const auto store = [&](std::size_t at, int d, const float4& o, float sum) {
    const float inverse = sum > 0.0f ? 1.0f / sum : 0.0f;  // a mask that hides everything gives zeros
    *reinterpret_cast<uint2*>(p.out + at * HD + d) =
        make_uint2(pack_bf16(o.x * inverse, o.y * inverse), pack_bf16(o.z * inverse, o.w * inverse));
  };
  for (int j = tid; j < fours; j += kTreeThreads) {
    const int element = (rank * fours + j) * 4, row = element / HD, d = element % HD;
    float highest = kTreeNoScore, sum = 0.0f;
    float4 o = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    for (int r = 0; r < p.cluster_size; r++) {
      highest = fmaxf(highest, tree_load_peer(&block_max[row], r, p.cluster_size));
    }
#pragma unroll 4
    for (int r = 0; r < p.cluster_size; r++) {
      const float e = exp2f(tree_load_peer(&block_max[row], r, p.cluster_size) - highest);
      const float4 v = tree_load_peer(reinterpret_cast<const float4*>(partial + row * kStride + d), r, p.cluster_size);
      sum = fmaf(e, tree_load_peer(&block_total[row], r, p.cluster_size), sum);
      o.x = fmaf(e, v.x, o.x), o.y = fmaf(e, v.y, o.y), o.z = fmaf(e, v.z, o.z), o.w = fmaf(e, v.w, o.w);
    }
    std::size_t at = 0;
    if (!place(row, at)) continue;
    if (units == 1) {
      store(at, d, o, sum);
      continue;
    }
    const std::size_t to = at * p.splits + unit;
    *reinterpret_cast<float4*>(p.partial_out + to * HD + d) = o;
    if (d == 0) p.partial_max[to] = highest, p.partial_sum[to] = sum;
  }
  tree_barrier(p.cluster_size);  // no block may leave while others read its shared memory
  if (units == 1) return;

  // The unit that is last merges. Slices are whole rows, so each rank has a counter of its own.
  __threadfence();
  __syncthreads();
  unsigned int* counter = p.num_done + (static_cast<std::size_t>(sequence) * gridDim.y + blockIdx.y) * p.cluster_size;
  if (tid == 0) order = atomicAdd(counter + rank, 1u);
  __syncthreads();
  if (order != static_cast<unsigned int>(units) - 1) return;
  __threadfence();
  for (int j = tid; j < fours; j += kTreeThreads) {
    const int element = (rank * fours + j) * 4, row = element / HD, d = element % HD;
    std::size_t at = 0;
    if (!place(row, at)) continue;
    at *= p.splits;
    float highest = kTreeNoScore, sum = 0.0f;
    float4 o = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    for (int u = 0; u < units; u++) highest = fmaxf(highest, load_l2(p.partial_max + at + u));
    for (int u = 0; u < units; u++) {
      const float e = exp2f(load_l2(p.partial_max + at + u) - highest);
      const float4 v = __ldcg(reinterpret_cast<const float4*>(p.partial_out + (at + u) * HD + d));
      sum = fmaf(e, load_l2(p.partial_sum + at + u), sum);
      o.x = fmaf(e, v.x, o.x), o.y = fmaf(e, v.y, o.y), o.z = fmaf(e, v.z, o.z), o.w = fmaf(e, v.w, o.w);
    }
    store(at / p.splits, d, o, sum);
  }
  if (tid == 0) counter[rank] = 0;  // for the next layer
}

template <int HD, KvFormat F, int kRowGroups>
void launch_tree_attention(const TreeAttentionArgs& args, const TreeAttentionParams& params, cudaStream_t stream,
                           bool pdl) {
  constexpr int kRows = 16 * kRowGroups;
  const auto kernel = tree_attention_kernel<HD, F, kRowGroups>;
  constexpr std::size_t shared_bytes = TreeShared<HD, F>::bytes(kRows);
  static_assert(kRowGroups > 2 || shared_bytes + kTreeStaticBytes <= 99 * 1024, "compute capability 8.9 has no more");
  EDGELLM_CUDA_TRY(
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes)));
  const bool modern = device_traits().has_dependent_launch;
  const bool clusters =
      runs_in_clusters(reinterpret_cast<const void*>(kernel), kTreeCluster, kTreeThreads, shared_bytes);
  const int chunks = ceil_div(args.max_tokens * (args.num_heads / args.kv.num_kv_heads), kRows);
  TreeAttentionParams p = params;
  p.cluster_size = clusters ? kTreeCluster : 1;
  const int blocks = args.kv.num_kv_heads * chunks;
  const int most_blocks = most_tree_chunks(args.num_heads, HD);
  if (args.num_sequences * blocks > most_blocks) {  // blocks of half as many rows need twice the counters
    throw std::invalid_argument("trees of up to " + std::to_string(args.max_tokens) + " tokens in " +
                                std::to_string(args.num_sequences) + " sequences are more than this GPU's blocks of " +
                                std::to_string(kRows) + " rows have counters for: at most " +
                                std::to_string(most_blocks / blocks) + " sequences");
  }
  if (p.splits == 0) {
    const int wanted = ceil_div(2 * device_traits().num_sms, blocks * args.num_sequences * p.cluster_size);
    p.splits = wanted < kMaxTreeSplits ? wanted : kMaxTreeSplits;
  }
  const std::size_t rows = static_cast<std::size_t>(args.num_sequences) * args.max_tokens * args.num_heads *
                           static_cast<std::size_t>(p.splits);
  p.partial_max = p.partial_out + rows * HD;
  p.partial_sum = p.partial_max + rows;

  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(p.splits * p.cluster_size, blocks, args.num_sequences);
  config.blockDim = dim3(kTreeThreads);
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  cudaLaunchAttribute attributes[2] = {};
  if (clusters) {
    attributes[config.numAttrs].id = cudaLaunchAttributeClusterDimension;
    attributes[config.numAttrs++].val.clusterDim = {kTreeCluster, 1, 1};
  }
  if (modern && pdl) {
    attributes[config.numAttrs].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[config.numAttrs++].val.programmaticStreamSerializationAllowed = 1;
  }
  config.attrs = attributes;
  EDGELLM_CUDA_TRY(cudaLaunchKernelEx(&config, kernel, p));
  EDGELLM_CUDA_TRY(cudaGetLastError());
}

template <int HD, KvFormat F>
void launch_tree_rows(const TreeAttentionArgs& args, const TreeAttentionParams& params, cudaStream_t stream, bool pdl) {
  if constexpr (HD > 128) {  // of which a block has no shared memory for 64 rows, nor a tile positions for four parts
    launch_tree_attention<HD, F, 2>(args, params, stream, pdl);
  } else {
    const int rows = args.max_tokens * (args.num_heads / args.kv.num_kv_heads);
    if (rows <= 16) return launch_tree_attention<HD, F, 1>(args, params, stream, pdl);
    // 64 rows of FP8 and heads of 128 are a little more than compute capability 8.6, 8.9 and 12.0 have.
    const bool fits = TreeShared<HD, F>::bytes(64) + kTreeStaticBytes <= device_traits().max_shared_bytes;
    if (rows <= 32 || !fits || args.most_rows == 32) {
      return launch_tree_attention<HD, F, 2>(args, params, stream, pdl);
    }
    launch_tree_attention<HD, F, 4>(args, params, stream, pdl);
  }
}

// One translation unit a head_dim.
template <int HD>
void launch_tree_head_dim(const TreeAttentionArgs& args, const TreeAttentionParams& params, cudaStream_t stream,
                          bool pdl) {
  if (args.kv.format == KvFormat::fp8) return launch_tree_rows<HD, KvFormat::fp8>(args, params, stream, pdl);
  if (args.kv.format == KvFormat::fp16) return launch_tree_rows<HD, KvFormat::fp16>(args, params, stream, pdl);
  launch_tree_rows<HD, KvFormat::bf16>(args, params, stream, pdl);
}

}  // namespace edgellm::kernels
