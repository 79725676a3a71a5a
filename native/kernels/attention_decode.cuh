// Decode attention of one head_dim: RoPE, KV write, and a softmax split over the sequence.
//
// A block has one sequence, one KV head (up to G of its query heads) and one split of the positions; its eight warps
// take positions in turn, LPP lanes a position. Splits are merged through the shared memory of a cluster of eight
// blocks, or through global memory by the block that finishes last.
#pragma once

#include <cassert>

#include "edgellm/kernels/attention_decode.hpp"
#include "kv_format.cuh"
#include "launch.hpp"

namespace edgellm::kernels {

constexpr int kAttentionThreads = 256;
constexpr int kClusterSplits = 8;
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
  float* partial_out;      // (batch, num_heads, splits, head_dim)
  float* partial_max;      // (batch, num_heads, splits)
  float* partial_sum;      // (batch, num_heads, splits)
  unsigned int* num_done;  // (batch, gridDim.y), zero between calls
  int num_heads;
  int num_kv_heads;
  int capacity;
  int window;
  float norm_eps;
  float scale;  // times log2(e)
};

__device__ __forceinline__ void cluster_barrier() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
#endif
}

// *p of the block with this rank in the cluster; p is in shared memory.
__device__ __forceinline__ float load_from_cluster(const float* p, int rank) {
  float v = 0.0f;
#if __CUDA_ARCH__ >= 900
  uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(p));
  asm volatile("mapa.shared::cluster.u32 %0,%0,%1;" : "+r"(address) : "r"(rank));
  asm volatile("ld.shared::cluster.f32 %0,[%1];" : "=f"(v) : "r"(address) : "memory");
#endif
  return v;
}

template <int HD, int G, KvFormat F, bool kCluster>
__global__ void __launch_bounds__(kAttentionThreads, G <= 4 ? 2 : 1)
    decode_attention_kernel(const DecodeAttentionParams p) {
  using Cache = Kv<F>;
  using Element = typename Cache::Element;
  constexpr int LPP = HD <= 64 ? 8 : 16;  // lanes a position; those past HD idle
  constexpr int PPW = 32 / LPP;           // positions a warp and load
  constexpr int NI = 4;                   // loads in flight of keys, and of values
  constexpr int kWarps = kAttentionThreads / 32;
  constexpr int kStep = kWarps * PPW;
  constexpr int H2 = HD / 2;
  __shared__ __align__(16) float q_rotated[G * HD];
  __shared__ __align__(16) Element new_key[HD], new_value[HD];
  __shared__ __align__(16) float warp_out[kWarps][G * HD];
  __shared__ float warp_max[kWarps][G], warp_total[kWarps][G];
  __shared__ float block_out[G * HD], block_max[G], block_total[G];
  __shared__ float inverse_rms[G + 1];
  __shared__ unsigned int order;

  const int tid = threadIdx.x, lane = tid & 31, warp = tid >> 5, sub = lane / LPP, d0 = (lane % LPP) * 8;
  const bool has_dims = d0 < HD;
  const int split = blockIdx.x, num_splits = gridDim.x, sequence = blockIdx.z;
  const int group = p.num_heads / p.num_kv_heads, chunks = ceil_div(group, G);
  const int kv_head = blockIdx.y / chunks, first_in_group = (blockIdx.y % chunks) * G;
  const int first_head = kv_head * group + first_in_group, num_valid = min(G, group - first_in_group);

  const std::size_t head_size = static_cast<std::size_t>(p.capacity) * HD;
  const int slot = p.slots[sequence];
  Element* keys =
      static_cast<Element*>(p.cache) + (static_cast<std::size_t>(slot) * 2 * p.num_kv_heads + kv_head) * head_size;
  Element* values = keys + p.num_kv_heads * head_size;

  typename Cache::Eight k[NI], v[NI];
  const auto range = [&](int position, int& start, int& end) {
    const int length = position + 1, first = p.window > 0 ? max(0, length - p.window) : 0;
    const int span = ceil_div(length - first, num_splits);
    start = first + split * span;
    end = min(length, start + span);
  };
  const auto load_tile = [&](int tile, int end, int position) {
#pragma unroll
    for (int i = 0; i < NI; i++) {
      const int at = tile + i * kStep + warp * PPW + sub;
      k[i] = v[i] = Cache::zeros();
      if (at < end && at != position && has_dims) {
        k[i] = Cache::load(keys + static_cast<std::size_t>(at) * HD + d0);
        v[i] = Cache::load(values + static_cast<std::size_t>(at) * HD + d0);
      }
    }
  };
  // The position may still be the last step's. If it is not, everything before it was written by steps that are
  // complete, and the first keys and values can be on their way while the predecessor computes.
  const int guess = *static_cast<const volatile int32_t*>(p.positions + sequence);
  int start = 0, end = 0;
  if (guess >= 0 && guess < p.capacity) {
    range(guess, start, end);
    load_tile(start, end, guess);
  }
  start_dependents();
  wait_for_predecessor();
  const int position = *static_cast<const volatile int32_t*>(p.positions + sequence);
  if (position < 0 || position >= p.capacity) {  // a free place of the batch; the whole cluster leaves
    for (int j = tid; split == 0 && j < num_valid * HD; j += kAttentionThreads) {
      p.out[(static_cast<std::size_t>(sequence) * p.num_heads + first_head) * HD + j] = __float2bfloat16(0.0f);
    }
    return;
  }
  if (position != guess) {
    range(position, start, end);
    load_tile(start, end, position);
  }

  const int width = (p.num_heads + 2 * p.num_kv_heads) * HD;
  const float* row = p.qkv + static_cast<std::size_t>(sequence) * width;
  const float* q = row + first_head * HD;
  const float* key = row + (p.num_heads + kv_head) * HD;
  const float* value = row + (p.num_heads + p.num_kv_heads + kv_head) * HD;
  const float* cos = p.cos + static_cast<std::size_t>(position) * H2;
  const float* sin = p.sin + static_cast<std::size_t>(position) * H2;
  const bool owns_new = position >= start && position < end;
  if (p.q_gain) {
    for (int h = warp; h < G + 1; h += kWarps) {
      const float* source = h < G ? q + min(h, num_valid - 1) * HD : key;
      float squares = 0.0f;
      for (int i = lane; i < HD; i += 32) {
        const float x = load_l2(source + i);
        squares = fmaf(x, x, squares);
      }
      squares = warp_sum(squares);
      if (lane == 0) inverse_rms[h] = rsqrtf(squares / HD + p.norm_eps);
    }
    __syncthreads();
  }
  for (int j = tid; j < G * H2; j += kAttentionThreads) {
    const int h = j / H2, i = j % H2;
    float x = 0.0f, y = 0.0f;
    if (h < num_valid) x = load_l2(q + h * HD + i), y = load_l2(q + h * HD + i + H2);
    if (p.q_gain) {
      x *= inverse_rms[h] * __bfloat162float(p.q_gain[i]);
      y *= inverse_rms[h] * __bfloat162float(p.q_gain[i + H2]);
    }
    const float c = __ldg(cos + i), s = __ldg(sin + i);
    q_rotated[h * HD + i] = (x * c - y * s) * p.scale;
    q_rotated[h * HD + i + H2] = (y * c + x * s) * p.scale;
  }
  if (owns_new) {
    const bool writes = first_in_group == 0;  // one of the blocks that share the KV head
    if (tid < H2) {
      float x = load_l2(key + tid), y = load_l2(key + tid + H2);
      if (p.k_gain) {
        x *= inverse_rms[G] * __bfloat162float(p.k_gain[tid]);
        y *= inverse_rms[G] * __bfloat162float(p.k_gain[tid + H2]);
      }
      const float c = __ldg(cos + tid), s = __ldg(sin + tid);
      const Element low = Cache::from_float(x * c - y * s), high = Cache::from_float(y * c + x * s);
      new_key[tid] = low, new_key[tid + H2] = high;
      if (writes) {
        keys[static_cast<std::size_t>(position) * HD + tid] = low;
        keys[static_cast<std::size_t>(position) * HD + tid + H2] = high;
      }
    } else if (tid >= 128 && tid < 128 + HD) {
      const int i = tid - 128;
      const Element e = Cache::from_float(load_l2(value + i));
      new_value[i] = e;
      if (writes) values[static_cast<std::size_t>(position) * HD + i] = e;
    }
  }
  __syncthreads();

  float qs[G][8], top[G], total[G], out[G][8];
#pragma unroll
  for (int g = 0; g < G; g++) {
    top[g] = kNoScore, total[g] = 0.0f;
#pragma unroll
    for (int j = 0; j < 8; j++) {
      qs[g][j] = has_dims ? q_rotated[g * HD + d0 + j] : 0.0f;
      out[g][j] = 0.0f;
    }
  }
  for (int tile = start; tile < end; tile += NI * kStep) {
    if (tile != start) load_tile(tile, end, position);
    float scores[NI][G];
#pragma unroll
    for (int i = 0; i < NI; i++) {
      if (tile + i * kStep >= end) {
#pragma unroll
        for (int g = 0; g < G; g++) scores[i][g] = kNoScore;
        continue;
      }
      const int at = tile + i * kStep + warp * PPW + sub;
      // Its row in the cache may not be visible yet. Beyond `end` it is another block's, and new_* are not set here.
      if (at == position && at < end && has_dims) {
        k[i] = *reinterpret_cast<const typename Cache::Eight*>(new_key + d0);
        v[i] = *reinterpret_cast<const typename Cache::Eight*>(new_value + d0);
      }
      float ks[8];
      Cache::unpack(k[i], ks);
#pragma unroll
      for (int g = 0; g < G; g++) {
        float dot = 0.0f;
#pragma unroll
        for (int j = 0; j < 8; j++) dot = fmaf(ks[j], qs[g][j], dot);
#pragma unroll
        for (int s = LPP / 2; s >= 1; s >>= 1) dot += __shfl_xor_sync(kAllLanes, dot, s);
        scores[i][g] = at < end ? dot : kNoScore;
      }
    }
#pragma unroll
    for (int g = 0; g < G; g++) {
      float higher = top[g];
#pragma unroll
      for (int i = 0; i < NI; i++) higher = fmaxf(higher, scores[i][g]);
#pragma unroll
      for (int s = LPP; s < 32; s <<= 1) higher = fmaxf(higher, __shfl_xor_sync(kAllLanes, higher, s));
      const float shrink = exp2f(top[g] - higher);
      top[g] = higher;
      total[g] *= shrink;
#pragma unroll
      for (int j = 0; j < 8; j++) out[g][j] *= shrink;
    }
#pragma unroll
    for (int i = 0; i < NI; i++) {
      if (tile + i * kStep >= end) continue;
      float vs[8];
      Cache::unpack(v[i], vs);
#pragma unroll
      for (int g = 0; g < G; g++) {
        const float weight = scores[i][g] > 0.5f * kNoScore ? exp2f(scores[i][g] - top[g]) : 0.0f;
        total[g] += weight;
#pragma unroll
        for (int j = 0; j < 8; j++) out[g][j] = fmaf(weight, vs[j], out[g][j]);
      }
    }
  }

#pragma unroll
  for (int g = 0; g < G; g++) {
#pragma unroll
    for (int s = LPP; s < 32; s <<= 1) {
      total[g] += __shfl_xor_sync(kAllLanes, total[g], s);
#pragma unroll
      for (int j = 0; j < 8; j++) out[g][j] += __shfl_xor_sync(kAllLanes, out[g][j], s);
    }
    if (sub == 0 && has_dims) {
      float4* to = reinterpret_cast<float4*>(&warp_out[warp][g * HD + d0]);
      to[0] = make_float4(out[g][0], out[g][1], out[g][2], out[g][3]);
      to[1] = make_float4(out[g][4], out[g][5], out[g][6], out[g][7]);
    }
    if (lane == 0) warp_max[warp][g] = top[g], warp_total[warp][g] = total[g];
  }
  __syncthreads();
  for (int j = tid; j < G * HD; j += kAttentionThreads) {
    const int g = j / HD;
    float highest = kNoScore, sum = 0.0f, o = 0.0f;
#pragma unroll
    for (int w = 0; w < kWarps; w++) highest = fmaxf(highest, warp_max[w][g]);
#pragma unroll
    for (int w = 0; w < kWarps; w++) {
      const float e = exp2f(warp_max[w][g] - highest);
      sum = fmaf(e, warp_total[w][g], sum);
      o = fmaf(e, warp_out[w][j], o);
    }
    block_out[j] = o;
    if (j % HD == 0) block_max[g] = highest, block_total[g] = sum;
  }

  bf16* to = p.out + (static_cast<std::size_t>(sequence) * p.num_heads + first_head) * HD;
  if constexpr (kCluster) {
    cluster_barrier();
    constexpr int kShare = G * HD / kClusterSplits;
    if (tid < kShare) {
      const int j = split * kShare + tid, g = j / HD;
      float maxima[kClusterSplits], totals[kClusterSplits], outs[kClusterSplits], highest = kNoScore;
#pragma unroll
      for (int r = 0; r < kClusterSplits; r++) {
        maxima[r] = load_from_cluster(&block_max[g], r);
        totals[r] = load_from_cluster(&block_total[g], r);
        outs[r] = load_from_cluster(&block_out[j], r);
      }
#pragma unroll
      for (int r = 0; r < kClusterSplits; r++) highest = fmaxf(highest, maxima[r]);
      float sum = 0.0f, o = 0.0f;
#pragma unroll
      for (int r = 0; r < kClusterSplits; r++) {
        const float e = exp2f(maxima[r] - highest);
        sum = fmaf(e, totals[r], sum);
        o = fmaf(e, outs[r], o);
      }
      if (g < num_valid) to[j] = __float2bfloat16(o / sum);
    }
    cluster_barrier();  // no block may leave while others read its shared memory
  } else {
    __syncthreads();
    const std::size_t first_row = static_cast<std::size_t>(sequence) * p.num_heads + first_head;
    for (int j = tid; j < num_valid * HD; j += kAttentionThreads) {
      const int g = j / HD;
      const std::size_t at = (first_row + g) * num_splits + split;
      p.partial_out[at * HD + j % HD] = block_out[j];
      if (j % HD == 0) p.partial_max[at] = block_max[g], p.partial_sum[at] = block_total[g];
    }
    __threadfence();
    __syncthreads();
    unsigned int* counter = p.num_done + sequence * gridDim.y + blockIdx.y;
    if (tid == 0) order = atomicAdd(counter, 1u);
    __syncthreads();
    if (order != static_cast<unsigned int>(num_splits) - 1) return;
    __threadfence();
    for (int j = tid; j < num_valid * HD; j += kAttentionThreads) {
      const std::size_t at = (first_row + j / HD) * num_splits;
      float highest = kNoScore, sum = 0.0f, o = 0.0f;
      for (int r = 0; r < num_splits; r++) highest = fmaxf(highest, load_l2(p.partial_max + at + r));
      for (int r = 0; r < num_splits; r++) {
        const float e = exp2f(load_l2(p.partial_max + at + r) - highest);
        sum = fmaf(e, load_l2(p.partial_sum + at + r), sum);
        o = fmaf(e, load_l2(p.partial_out + (at + r) * HD + j % HD), o);
      }
      to[j] = __float2bfloat16(o / sum);
    }
    if (tid == 0) *counter = 0;  // for the next layer
  }
}

template <int HD, int G, KvFormat F>
void launch_decode_attention(const DecodeAttentionArgs& args, const DecodeAttentionParams& params, cudaStream_t stream,
                             bool pdl) {
  const int chunks = ceil_div(args.num_heads / args.kv.num_kv_heads, G);
  const dim3 grid(args.splits, args.kv.num_kv_heads * chunks, args.batch);
  const bool cluster = args.splits == kClusterSplits && device_traits().has_dependent_launch;
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = dim3(kAttentionThreads);
  config.stream = stream;
  cudaLaunchAttribute attributes[2] = {};
  if (pdl && device_traits().has_dependent_launch) {
    attributes[config.numAttrs].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[config.numAttrs++].val.programmaticStreamSerializationAllowed = 1;
  }
  if (cluster) {
    attributes[config.numAttrs].id = cudaLaunchAttributeClusterDimension;
    attributes[config.numAttrs++].val.clusterDim = {kClusterSplits, 1, 1};
  }
  config.attrs = attributes;
  const auto kernel = cluster ? decode_attention_kernel<HD, G, F, true> : decode_attention_kernel<HD, G, F, false>;
  EDGELLM_CUDA_TRY(cudaLaunchKernelEx(&config, kernel, params));
  EDGELLM_CUDA_TRY(cudaGetLastError());
}

// The smallest compiled G that holds a KV head's query heads; larger groups take several blocks.
template <int HD, KvFormat F>
void launch_for_group(const DecodeAttentionArgs& args, const DecodeAttentionParams& params, cudaStream_t stream,
                      bool pdl) {
  const int group = args.num_heads / args.kv.num_kv_heads;
  if (group == 1) return launch_decode_attention<HD, 1, F>(args, params, stream, pdl);
  if (group == 2) return launch_decode_attention<HD, 2, F>(args, params, stream, pdl);
  if (group == 3 || group == 6) return launch_decode_attention<HD, 3, F>(args, params, stream, pdl);
  if (group == 7) return launch_decode_attention<HD, 7, F>(args, params, stream, pdl);
  if (group == 8) return launch_decode_attention<HD, 8, F>(args, params, stream, pdl);
  launch_decode_attention<HD, 4, F>(args, params, stream, pdl);
}

// One translation unit a head_dim.
template <int HD>
void launch_for_head_dim(const DecodeAttentionArgs& args, const DecodeAttentionParams& params, cudaStream_t stream,
                         bool pdl) {
  if (args.kv.format == KvFormat::fp8) return launch_for_group<HD, KvFormat::fp8>(args, params, stream, pdl);
  launch_for_group<HD, KvFormat::bf16>(args, params, stream, pdl);
}

}  // namespace edgellm::kernels
