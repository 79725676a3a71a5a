// Decode attention of one head_dim: RoPE, KV write, and a softmax split over the sequence.
//
// A block has one sequence, one KV head (up to eight of its query heads) and one split of the positions, or several of
// them one after the other where a batch has more splits than the GPU takes at once; its four warps, or eight where the
// sequence is long, take tiles of sixteen positions in turn, and each has its next tiles' loads under way while it
// computes one. Splits are merged in eights, by the block that has all of one or through the shared memory of a cluster
// of blocks where the GPU has clusters, and the eights through global memory. The order of a sequence's sums is set by
// its length alone: who computes a split and who merges an eight changes no bit.
#pragma once

#include <algorithm>

#include "attention_decode_parts.cuh"
#include "attention_decode_tile.cuh"
#include "cluster.cuh"

namespace edgellm::kernels {

// Tiles that a warp has in registers: 48 to 64 KB of keys and values a block are under way. Of heads wider than 128 one
// is more than that.
template <int HD, KvFormat F>
constexpr int kTilesInFlight = HD > 128 ? 1 : std::clamp(112 / PositionTile<HD, F>::kRegisters, 2, 4);
// Blocks an SM whose registers hold that, the sums and the queries.
template <int HD, KvFormat F>
constexpr int kBlocksPerSm = kTilesInFlight<HD, F> * PositionTile<HD, F>::kRegisters + HD / 2 <= 112 ? 3 : 2;

// kSeveral: splits_per_block is not 1.
template <int HD, KvFormat F, int kWarps, bool kSeveral>
__global__ void __launch_bounds__(kWarps * 32, (kWarps == kAttentionWarps ? kBlocksPerSm<HD, F> : 1))
    decode_attention_kernel(const DecodeAttentionParams p) {
  constexpr int kThreads = kWarps * 32;
  using Range = SplitRange<kWarps, kSeveral>;
  using Tile = PositionTile<HD, F>;
  using Element = typename Tile::Element;
  using Row = RopeRow<HD>;
  using Shared = DecodeAttentionShared<HD, kSeveral>;
  constexpr int kTiles = kTilesInFlight<HD, F>;
  constexpr int kRowPasses = (kTileHeads + 2 + kWarps - 1) / kWarps;
  static_assert(Shared::kQueryBytes % 16 == 0);
  extern __shared__ __align__(16) std::byte attention_shared[];
  __shared__ __align__(16) Element new_key[HD], new_value[HD];
  __shared__ __align__(16) int32_t positions[4];
  __shared__ uint64_t new_rows_arrival, arrivals;
  __shared__ unsigned int order;

  const int tid = threadIdx.x, lane = tid & 31, warp = tid >> 5, g = lane >> 2, t = lane & 3;
  const int num_own = kSeveral ? p.splits_per_block : 1, first_split = blockIdx.x * num_own, sequence = blockIdx.z;
  const int group = p.num_heads / p.num_kv_heads, chunks = ceil_div(group, kTileHeads);
  const int heads_per_chunk = ceil_div(group, chunks);
  const int kv_head = blockIdx.y / chunks, first_in_group = (blockIdx.y % chunks) * heads_per_chunk;
  const int first_head = kv_head * group + first_in_group, num_valid = min(heads_per_chunk, group - first_in_group);

  const int num_outs = num_valid * HD;
  const Shared layout = {kWarps, num_own, p.cluster, num_outs};
  using QueryRow = uint16_t[kTileHeads][Shared::kQueryStride];
  auto* queries = reinterpret_cast<QueryRow*>(attention_shared);  // [2]: rounded, and the rest
  // (num_own, kWarps, layout.row()), and of each head maximum and total. First the new rows lie there.
  auto* warp_out = reinterpret_cast<float*>(attention_shared + Shared::kQueryBytes);
  auto* warp_tops = reinterpret_cast<float2*>(attention_shared + Shared::kQueryBytes + layout.sum_bytes());
  // Of every split of the cluster: the sums of the outputs that this block merges, and each head's maximum and total.
  auto* received = reinterpret_cast<float*>(warp_tops + num_own * kWarps * kTileHeads);
  auto* received_tops = reinterpret_cast<float2*>(received + layout.received());

  const std::size_t head_size = static_cast<std::size_t>(p.capacity) * HD;
  const int slot = p.slots[sequence];
  Element* keys =
      static_cast<Element*>(p.cache) + (static_cast<std::size_t>(slot) * 2 * p.num_kv_heads + kv_head) * head_size;
  Element* values = keys + p.num_kv_heads * head_size;
  const std::byte* key_bytes = reinterpret_cast<const std::byte*>(keys);
  const std::byte* value_bytes = reinterpret_cast<const std::byte*>(values);

  Tile tiles[kTiles];
  typename Range::Tile ahead;  // what is loaded next, kTiles after what is computed
  float cos[Row::kPairs], sin[Row::kPairs];
  const auto load_first = [&](const Range& range, int position) {
    ahead = range.first_tile(first_split);
#pragma unroll
    for (int r = 0; r < kTiles; r++) {
      if (ahead.base < position) {  // the new token's row is not there yet
        tiles[r].load_keys(key_bytes, ahead.base, position - 1, lane);
        if constexpr (!Tile::kSharedQueries) tiles[r].load_values(value_bytes, ahead.base, position - 1, lane);
      }
      ahead = range.next_tile(ahead);
    }
#pragma unroll
    for (int j = 0; j < Row::kPairs; j++) {
      const std::size_t at = static_cast<std::size_t>(position) * Row::kHalf + lane + 32 * j;
      cos[j] = Row::has(j, lane) ? __ldg(p.cos + at) : 0.0f;
      sin[j] = Row::has(j, lane) ? __ldg(p.sin + at) : 0.0f;
    }
  };
  // The position may still be the last step's. If it is not, everything before it was written by steps that are
  // complete, and the first keys and values can be on their way while the predecessor computes.
  const int guess = *static_cast<const volatile int32_t*>(p.positions + sequence);
  Range range(p, max(guess, 0), first_split, warp);
  ahead = {first_split, range.end};
  if (guess >= 0 && guess < p.capacity) load_first(range, guess);
  for (int j = tid; j < (kTileHeads - num_valid) * HD; j += kThreads) {  // columns without a head
    queries[0][num_valid + j / HD][j % HD] = queries[1][num_valid + j / HD][j % HD] = 0;
  }
  if (tid == 0) {
    mbarrier_init(&new_rows_arrival);
    if (p.cluster > 1) mbarrier_init(&arrivals);
  }
  __syncthreads();
  if (p.cluster > 1) cluster_arrive_relaxed();
  // The next kernel's weights may come when all of a warp's loads are under way, not between them. The first that says
  // so speaks for its block.
  if (!range.has(ahead)) start_dependents();
  wait_for_predecessor();

  const NewRows new_rows = {warp_out, positions, &new_rows_arrival, p};
  const int position = new_rows.fetch<HD, kThreads>(sequence, first_head, num_valid, kv_head);
  Row rows[kRowPasses];
#pragma unroll
  for (int pass = 0; pass < kRowPasses; pass++) {
    const int row = pass * kWarps + warp;
    if (row >= num_valid + 2) continue;
    rows[pass].load(new_rows.rows + row * HD, row < num_valid ? p.q_gain : row == num_valid ? p.k_gain : nullptr, lane);
  }
  if (position < 0 || position >= p.capacity) {  // a free place of the batch; the whole cluster leaves
    for (int j = tid; first_split == 0 && j < num_outs; j += kThreads) {
      p.out[(static_cast<std::size_t>(sequence) * p.num_heads + first_head) * HD + j] = __float2bfloat16(0.0f);
    }
    return;
  }
  if (position != guess) {
    range = Range(p, position, first_split, warp);
    load_first(range, position);
  }
  if (first_split >= range.num_splits) return;  // launched for a longer sequence of the batch
  const bool owns_new = range.has_last(position, first_split);

#pragma unroll
  for (int pass = 0; pass < kRowPasses; pass++) {
    const int row = pass * kWarps + warp;
    if (row >= num_valid + 2) continue;
    Row& own = rows[pass];
    if (row <= num_valid) {
      if (row < num_valid ? p.q_gain != nullptr : p.k_gain != nullptr) own.normalise(p.norm_eps);
      own.rotate(cos, sin);
    } else if (!owns_new) {
      continue;
    }
#pragma unroll
    for (int j = 0; j < Row::kPairs; j++) {
      const int i = lane + 32 * j;
      if (!Row::has(j, lane)) continue;
      if (row < num_valid) {
#pragma unroll
        for (int k = 0; k < 2; k++) {
          const float x = (k ? own.high[j] : own.low[j]) * p.scale;
          const int dim = i + k * Row::kHalf;
          if constexpr (F == KvFormat::bf16) {
            const bf16 rounded = __float2bfloat16(x);
            queries[0][row][dim] = __bfloat16_as_ushort(rounded);
            queries[1][row][dim] = __bfloat16_as_ushort(__float2bfloat16(x - __bfloat162float(rounded)));
          } else {
            const __half rounded = Kv<KvFormat::fp16>::from_float(x);
            queries[0][row][dim] = __half_as_ushort(rounded);
            queries[1][row][dim] = __half_as_ushort(Kv<KvFormat::fp16>::from_float(x - __half2float(rounded)));
          }
        }
      } else if (owns_new) {
        const Element low = Kv<F>::from_float(own.low[j]), high = Kv<F>::from_float(own.high[j]);
        Element* shared = row == num_valid ? new_key : new_value;
        shared[i] = low, shared[i + Row::kHalf] = high;
        if (first_in_group == 0) {  // one of the blocks that share the KV head
          Element* to = (row == num_valid ? keys : values) + static_cast<std::size_t>(position) * HD;
          to[i] = low, to[i + Row::kHalf] = high;
        }
      }
    }
  }
  __syncthreads();

  uint32_t q[Tile::kSharedQueries ? 1 : Tile::kSteps][4];
#pragma unroll
  for (int s = 0; s < (Tile::kSharedQueries ? 0 : Tile::kSteps); s++) {
    const uint2 rounded = *reinterpret_cast<const uint2*>(&queries[0][g][Tile::key_dim(s, t)]);
    const uint2 rest = *reinterpret_cast<const uint2*>(&queries[1][g][Tile::key_dim(s, t)]);
    q[s][0] = rounded.x, q[s][1] = rest.x, q[s][2] = rounded.y, q[s][3] = rest.y;
  }
  typename Range::Tile current = range.first_tile(first_split);
  if constexpr (Tile::kSharedQueries) {  // until here the registers were the new rows'
    static_assert(kTiles == 1 || !Tile::kSharedQueries);
    if (current.base < position) tiles[0].load_values(value_bytes, current.base, position - 1, lane);
  }
  if (!range.has(ahead)) start_dependents();
  float top = kNoScore;                            // of head g
  float total[4] = {}, out[Tile::kSteps][4] = {};  // of heads 2t and 2t + 1
  int num_stored = 0;
  // Of the splits before the block's n-th that are not there yet. A warp may have had no tile of some.
  const auto store_sums_before = [&](int n) {
    for (; num_stored < n; num_stored++) {
      const int row = num_stored * kWarps + warp;
#pragma unroll
      for (int k = 0; k < 2; k++) {
        const int head = 2 * t + k;
        if (head < num_valid) {
#pragma unroll
          for (int d = 0; d < Tile::kSteps; d++) {
            float2* to = reinterpret_cast<float2*>(warp_out + row * layout.row() + head * HD + Tile::value_dim(d, g));
            *to = make_float2(out[d][k] * Tile::kUnscale, out[d][k + 2] * Tile::kUnscale);
          }
          if (g == 0) warp_tops[row * kTileHeads + head].y = total[k];
        }
#pragma unroll
        for (int d = 0; d < Tile::kSteps; d++) out[d][k] = out[d][k + 2] = 0.0f;
        total[k] = 0.0f;
      }
      if (t == 0) warp_tops[row * kTileHeads + g].x = top;
      top = kNoScore;
    }
  };
  while (range.has(current)) {
#pragma unroll
    for (int r = 0; r < kTiles; r++) {
      if (!range.has(current)) break;
      if constexpr (kSeveral) store_sums_before(current.split - first_split);
      const int base = current.base, next = ahead.base;
      Tile& tile = tiles[r];
      // The new token's row in the cache may not be visible yet.
      if (owns_new && position - base < kTilePositions) tile.insert(new_key, new_value, position - base, lane);
      float scores[4];
      if constexpr (Tile::kSharedQueries) {
        tile.score(queries[0][g], queries[1][g], t, scores);
      } else {
        tile.score(q, scores);
      }
      if (next < position) tile.load_keys(key_bytes, next, position - 1, lane);
      if (base + kTilePositions > range.end) {
#pragma unroll
        for (int i = 0; i < 4; i++) {
          if (base + Tile::value_row(i, t) >= range.end) scores[i] = kNoScore;
        }
      }
      float higher = fmaxf(fmaxf(scores[0], scores[1]), fmaxf(scores[2], scores[3]));
      if (__any_sync(kAllLanes, higher > top)) {
        higher = fmaxf(higher, __shfl_xor_sync(kAllLanes, higher, 1));
        higher = fmaxf(top, fmaxf(higher, __shfl_xor_sync(kAllLanes, higher, 2)));
        const float shrink = fast_exp2(top - higher);
        top = higher;
#pragma unroll
        for (int k = 0; k < 2; k++) {
          const float own = __shfl_sync(kAllLanes, shrink, 4 * (2 * t + k));
          total[k] *= own;
#pragma unroll
          for (int d = 0; d < Tile::kSteps; d++) out[d][k] *= own, out[d][k + 2] *= own;
        }
      }
      const uint32_t b0 = tile_pack<F>(fast_exp2(scores[0] - top), fast_exp2(scores[1] - top));
      const uint32_t b1 = tile_pack<F>(fast_exp2(scores[2] - top), fast_exp2(scores[3] - top));
      const uint32_t one = tile_pack<F>(1.0f, 1.0f);
      const uint32_t ones[4] = {one, one, one, one};
      tile_mma<F>(total, ones, b0, b1);  // of the weights as they are rounded
      tile.accumulate(b0, b1, out);
      if (next < position) tile.load_values(value_bytes, next, position - 1, lane);
      current = range.next_tile(current), ahead = range.next_tile(ahead);
    }
    if (!range.has(ahead)) start_dependents();
  }
  store_sums_before(num_own);
  __syncthreads();

  // Each block of the cluster merges a share of the outputs, which the others put into its shared memory.
  const int rank = blockIdx.x % p.cluster, num_parts = p.cluster * num_own;
  const int share = layout.share(), first_out = rank * share, last_out = min(num_outs, first_out + share);
  if (p.cluster > 1) {
    if (tid == 0) {
      const int num_numbers = max(0, last_out - first_out) + 2 * num_valid;  // from each of them, this one included
      mbarrier_expect(&arrivals, num_parts * num_numbers * static_cast<int>(sizeof(float)));
    }
    cluster_wait();  // until all of its blocks run and have their mbarriers
  }
  for (int own = 0; own < num_own; own++) {
    const int part = rank * num_own + own;
    const float2* tops = warp_tops + own * kWarps * kTileHeads;
    for (int j = 4 * tid; j < num_outs; j += 4 * kThreads) {
      const int head = j / HD;
      float highest = kNoScore, sum = 0.0f;
      float4 merged = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
#pragma unroll
      for (int w = 0; w < kWarps; w++) highest = fmaxf(highest, tops[w * kTileHeads + head].x);
#pragma unroll
      for (int w = 0; w < kWarps; w++) {
        const float2 top = tops[w * kTileHeads + head];
        const float e = fast_exp2(top.x - highest);
        const float4 v = *reinterpret_cast<const float4*>(warp_out + (own * kWarps + w) * layout.row() + j);
        sum = fmaf(e, top.y, sum);
        merged.x = fmaf(e, v.x, merged.x), merged.y = fmaf(e, v.y, merged.y);
        merged.z = fmaf(e, v.z, merged.z), merged.w = fmaf(e, v.w, merged.w);
      }
      const int target = j / share;
      float4* to = reinterpret_cast<float4*>(&received[part * share + j - target * share]);
      float2* to_top = &received_tops[part * kTileHeads + head];
      const int peer = j % HD / 4;  // the threads of a head tell one block each
      static_assert(HD / 4 >= kMaxCluster);
      if (p.cluster > 1) {
        store_async(to, &arrivals, target, merged);
        if (peer < p.cluster) store_async(to_top, &arrivals, peer, make_float2(highest, sum));
      } else {
        *to = merged;
        if (peer == 0) *to_top = make_float2(highest, sum);
      }
    }
  }
  const std::size_t first_row = static_cast<std::size_t>(sequence) * p.num_heads + first_head;
  if (p.cluster > 1) {
    mbarrier_wait(&arrivals);
  } else {
    __syncthreads();
  }
  // An eight is merged here if all of it is here, else by the block that comes last, as are the eights.
  const bool is_whole = num_parts == kMaxCluster || num_parts >= range.num_splits;
  const int set = is_whole ? num_parts : 1, num_sets = range.num_splits / set;
  const auto most_sets = [&] { return gridDim.x * num_own / set; };  // of the launch
  const bool exchanges = set == kMaxCluster && num_sets == 2 && p.exchanged;
  for (int own = 0; own < (kSeveral && !is_whole ? num_parts : 1); own++) {
    for (int j = first_out + 2 * tid; j < last_out; j += 2 * kThreads) {
      const int head = j / HD;
      Partial<2> parts[kMaxCluster], merged;
      float highest = kNoScore;
#pragma unroll
      for (int r = 0; r < kMaxCluster; r++) {
        if (r >= set) continue;
        const int part = own * set + r;
        const float2 top = received_tops[part * kTileHeads + head];
        const float2 v = *reinterpret_cast<const float2*>(&received[part * share + j - first_out]);
        parts[r].top = top.x, parts[r].total = top.y, parts[r].out[0] = v.x, parts[r].out[1] = v.y;
      }
#pragma unroll
      for (int r = 0; r < kMaxCluster; r++) highest = fmaxf(highest, parts[r].top);
#pragma unroll
      for (int r = 0; r < kMaxCluster; r++) merged.add(parts[r], highest);
      const std::size_t row = first_row + head;
      if (exchanges) {
        // The eight that comes first leaves its sums, the other finds them. A total of zero would look like none.
        uint4* place = p.exchanged + (row * HD + j % HD) / 2;
        const uint4 other = exchange(place, make_uint4(__float_as_uint(merged.top), nonzero_bits(merged.total),
                                                       __float_as_uint(merged.out[0]), __float_as_uint(merged.out[1])));
        if (other.y == 0) continue;
        *place = make_uint4(0, 0, 0, 0);
        Partial<2> found, both;
        found.top = __uint_as_float(other.x), found.total = __uint_as_float(other.y);
        found.out[0] = __uint_as_float(other.z), found.out[1] = __uint_as_float(other.w);
        highest = fmaxf(found.top, merged.top);
        if (first_split < kMaxCluster) {
          both.add(merged, highest), both.add(found, highest);
        } else {
          both.add(found, highest), both.add(merged, highest);
        }
        merged = both;
      }
      if (num_sets == 1 || exchanges) {
        *reinterpret_cast<uint32_t*>(p.out + row * HD + j % HD) =
            pack_bf16(merged.out[0] / merged.total, merged.out[1] / merged.total);
        continue;
      }
      const std::size_t at = row * most_sets() + (first_split - rank * num_own) / set + own;
      *reinterpret_cast<float2*>(p.partial_out + at * HD + j % HD) = make_float2(merged.out[0], merged.out[1]);
      // Ranks that share a head write the same numbers; each must have done so before it is counted below.
      if (j == first_out || j % HD == 0) p.partial_tops[at] = make_float2(merged.top, merged.total);
    }
  }
  if (num_sets == 1 || exchanges) return;

  __threadfence();
  __syncthreads();
  unsigned int* counter =
      p.num_done + (static_cast<std::size_t>(sequence) * gridDim.y + blockIdx.y) * kMaxCluster + rank;
  if (tid == 0) order = atomicAdd(counter, 1u);
  __syncthreads();
  if (order != static_cast<unsigned int>(range.num_splits / num_parts) - 1) return;
  __threadfence();
  for (int j = first_out + 4 * tid; j < last_out; j += 4 * kThreads) {
    const std::size_t row = (first_row + j / HD) * most_sets();
    const auto load = [&](int r) {
      const float2 top = __ldcg(p.partial_tops + row + r);
      const float4 v = __ldcg(reinterpret_cast<const float4*>(p.partial_out + (row + r) * HD + j % HD));
      return Partial<4>{top.x, top.y, {v.x, v.y, v.z, v.w}};
    };
    // In eights, as clusters do it. All loads of two of them at once.
    Partial<4> merged;
    float highest = kNoScore;
    if (num_sets <= 2 * kMaxCluster) {
      // Not [2][8]: of an array of arrays nvcc 13.0 initialises the first alone.
      Partial<4> parts[2 * kMaxCluster], eights[2];
#pragma unroll
      for (int r = 0; r < 2 * kMaxCluster; r++) {
        if (r < num_sets) parts[r] = load(r);
      }
#pragma unroll
      for (int i = 0; i < 2; i++) {
        float top = kNoScore;
#pragma unroll
        for (int r = 0; r < kMaxCluster; r++) top = fmaxf(top, parts[i * kMaxCluster + r].top);
#pragma unroll
        for (int r = 0; r < kMaxCluster; r++) eights[i].add(parts[i * kMaxCluster + r], top);
      }
      highest = fmaxf(eights[0].top, eights[1].top);
      merged.add(eights[0], highest), merged.add(eights[1], highest);
    } else {
      for (int r = 0; r < num_sets; r++) highest = fmaxf(highest, __ldcg(p.partial_tops + row + r).x);
      for (int first = 0; first < num_sets; first += kMaxCluster) {
        Partial<4> parts[kMaxCluster], eight;
        float top = kNoScore;
#pragma unroll
        for (int r = 0; r < kMaxCluster; r++) parts[r] = load(first + r);
#pragma unroll
        for (int r = 0; r < kMaxCluster; r++) top = fmaxf(top, parts[r].top);
#pragma unroll
        for (int r = 0; r < kMaxCluster; r++) eight.add(parts[r], top);
        merged.add(eight, highest);
      }
    }
    *reinterpret_cast<uint2*>(p.out + first_row * HD + j) =
        make_uint2(pack_bf16(merged.out[0] / merged.total, merged.out[1] / merged.total),
                   pack_bf16(merged.out[2] / merged.total, merged.out[3] / merged.total));
  }
  if (tid == 0) *counter = 0;  // for the next layer
}

}  // namespace edgellm::kernels
