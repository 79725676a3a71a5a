// Sampling as edgellm_ros/runtime/sampling.py defines it, one cluster of blocks a sequence, in one launch.
//
// Order: bias, repetition, frequency and presence penalty, mask, temperature, top-k, top-p, min-p; the draw is a number
// from (seed, index) and falls on the tokens in the order of their ids. Each block keeps its share of the scores in
// shared memory. Every sum is over integers (weights in units of 2^-44 of the largest): the result does not depend on
// the order in which threads add, and the same request and seed give the same token on any GPU with the same logits.
#include <cassert>
#include <cmath>

#include "device.cuh"
#include "edgellm/kernels/sampling.hpp"
#include "launch.hpp"
#include "sampling_finish.cuh"

namespace edgellm::kernels {

namespace {

using uint64 = unsigned long long;

constexpr int kThreads = 1024;
constexpr int kWarps = kThreads / 32;
constexpr int kClusterSize = 8;
constexpr int kDigits = 256;
constexpr float kWeightUnit = 17592186044416.0f;  // 2^44: the sum of 2^19 weights still fits 64 bits
constexpr float kMinTemperature = 1e-6f;
// A score's rank: its distance from the best in units of 2^-26, farther than 63.9 all the same; masked is beyond all.
constexpr uint32_t kFarRank = 0xfffffffeu;
constexpr uint32_t kMaskedRank = 0xffffffffu;

struct Params {
  const float* logits;
  float* scores;
  SamplingRow* rows;
  uint32_t* counts;
  const int32_t* bias_ids;
  const float* bias_values;
  const uint32_t* token_mask;
  float* logprobs;
  int max_bias;
  int vocab;
  int share;  // scores a block
  bool in_shared;
  NextStep next;
};

__device__ __forceinline__ uint64 mix(uint64 v) {  // SplitMix64 (Steele et al. 2014)
  v += 0x9e3779b97f4a7c15ull;
  v = (v ^ (v >> 30)) * 0xbf58476d1ce4e5b9ull;
  v = (v ^ (v >> 27)) * 0x94d049bb133111ebull;
  return v ^ (v >> 31);
}
__device__ __forceinline__ double uniform(uint64 seed, int index) {
  const uint64 bits = mix(mix(seed) + 0x9e3779b97f4a7c15ull * static_cast<uint64>(index + 1));
  return static_cast<double>(bits >> 11) * 0x1p-53;
}

// The blocks of one sequence. A single block works without cluster instructions.
struct Cluster {
  int rank;
  int size;

  __device__ __forceinline__ void barrier() const {
#if __CUDA_ARCH__ >= 900
    if (size > 1) {
      asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
      return;
    }
#endif
    __syncthreads();
  }
  // *p of block `r`; p is in shared memory.
  __device__ __forceinline__ uint64 load(const uint64* p, int r) const {
#if __CUDA_ARCH__ >= 900
    if (size > 1) {
      uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(p));
      uint64 v;
      asm volatile("mapa.shared::cluster.u32 %0,%0,%1;" : "+r"(address) : "r"(r));
      asm volatile("ld.shared::cluster.u64 %0,[%1];" : "=l"(v) : "r"(address) : "memory");
      return v;
    }
#endif
    return *p;
  }
};

// A pass's histogram; two take turns, so that one is read by other blocks while the next is filled.
struct Histogram {
  uint64 counts[kDigits];
  uint64 masses[kDigits];
};

struct Shared {
  Histogram histograms[2];
  uint64 merged_counts[kDigits];
  uint64 merged_masses[kDigits];
  uint64 warp_values[kWarps];
  uint64 exchanged[8];  // one entry an exchange, never reused
  uint64 warp_masses[kWarps];
  uint64 warp_ties[kWarps];
  uint64 found_below_count, found_below_mass, found_count, found_mass;
  uint32_t found_digit;
  int token;
};

__device__ __forceinline__ uint64 warp_sum64(uint64 v) {
#pragma unroll
  for (int s = 16; s >= 1; s >>= 1) v += __shfl_xor_sync(kAllLanes, v, s);
  return v;
}

enum class Combine { sum, max };

// Over all threads of the block, in every thread.
template <Combine kHow>
__device__ uint64 block_combine(Shared& shared, uint64 v) {
  const auto join = [](uint64 a, uint64 b) { return kHow == Combine::sum ? a + b : larger(a, b); };
#pragma unroll
  for (int s = 16; s >= 1; s >>= 1) v = join(v, __shfl_xor_sync(kAllLanes, v, s));
  if ((threadIdx.x & 31) == 0) shared.warp_values[threadIdx.x / 32] = v;
  __syncthreads();
  v = shared.warp_values[threadIdx.x & 31];
#pragma unroll
  for (int s = 16; s >= 1; s >>= 1) v = join(v, __shfl_xor_sync(kAllLanes, v, s));
  __syncthreads();
  return v;
}

// Over all threads of the cluster. Entry `exchange` of Shared::exchanged keeps the block's own value.
template <Combine kHow>
__device__ uint64 cluster_combine(Shared& shared, const Cluster& cluster, uint64 v, int exchange) {
  v = block_combine<kHow>(shared, v);
  if (threadIdx.x == 0) shared.exchanged[exchange] = v;
  cluster.barrier();
  v = cluster.load(&shared.exchanged[exchange], 0);
  for (int r = 1; r < cluster.size; r++) {
    const uint64 other = cluster.load(&shared.exchanged[exchange], r);
    v = kHow == Combine::sum ? v + other : larger(v, other);
  }
  return v;
}

struct Scores {
  const float* values;  // this block's share
  int count;
  float best;
  float inverse_temperature;

  __device__ __forceinline__ uint32_t rank(float score) const {
    if (score == -INFINITY) return kMaskedRank;
    const float distance = best - score;
    return distance >= 63.9f ? kFarRank : static_cast<uint32_t>(distance * 67108864.0f);
  }
  __device__ __forceinline__ float weight(float score) const { return expf((score - best) * inverse_temperature); }
  __device__ __forceinline__ uint64 mass(float score) const { return __float2ull_rn(weight(score) * kWeightUnit); }
};

struct Border {
  uint32_t rank;
  uint64 below_mass;  // of the ranks before it
  uint64 count;       // of tokens that have it
  uint64 mass;        // of them together
};

// The lowest rank up to which the tokens' count (or mass) reaches `goal`, among ranks up to `limit`: a radix selection,
// eight bits a pass. `pass` counts the passes of all selections.
template <bool kByMass>
__device__ Border select_border(Shared& shared, const Cluster& cluster, const Scores& scores, uint32_t limit,
                                uint64 goal, int& pass) {
  Border border = {0, 0, 0, 0};
  uint64 below = 0;  // count or mass before the current prefix
  for (int shift = 24; shift >= 0; shift -= 8, pass++) {
    Histogram& histogram = shared.histograms[pass & 1];
    for (int i = threadIdx.x; i < kDigits; i += kThreads) histogram.counts[i] = histogram.masses[i] = 0;
    __syncthreads();
    for (int i = threadIdx.x; i < scores.count; i += kThreads) {
      const uint32_t rank = scores.rank(scores.values[i]);
      if (rank > limit || rank == kMaskedRank) continue;
      if (shift < 24 && rank >> (shift + 8) != border.rank >> (shift + 8)) continue;
      const uint32_t digit = (rank >> shift) & (kDigits - 1);
      atomicAdd(&histogram.counts[digit], 1ull);
      if (kByMass) atomicAdd(&histogram.masses[digit], scores.mass(scores.values[i]));
    }
    cluster.barrier();
    if (threadIdx.x < kDigits) {
      uint64 count = 0, mass = 0;
      for (int r = 0; r < cluster.size; r++) {
        count += cluster.load(&histogram.counts[threadIdx.x], r);
        if (kByMass) mass += cluster.load(&histogram.masses[threadIdx.x], r);
      }
      shared.merged_counts[threadIdx.x] = count;
      shared.merged_masses[threadIdx.x] = mass;
    }
    __syncthreads();
    if (threadIdx.x < 32) {  // a lane has eight digits
      const int lane = threadIdx.x;
      uint64 own = 0;
      for (int i = 0; i < 8; i++)
        own += kByMass ? shared.merged_masses[lane * 8 + i] : shared.merged_counts[lane * 8 + i];
      uint64 upto = own;
#pragma unroll
      for (int s = 1; s < 32; s <<= 1) {
        const uint64 before = __shfl_up_sync(kAllLanes, upto, s);
        if (lane >= s) upto += before;
      }
      const unsigned reached = __ballot_sync(kAllLanes, below + upto >= goal);
      // Rounding may put the goal a little past the end: then the last digit that has tokens.
      const unsigned occupied = __ballot_sync(kAllLanes, own > 0);
      const int owner = reached ? __ffs(reached) - 1 : 31 - __clz(occupied | 1u);
      if (lane == owner) {
        uint64 before = below + upto - own;
        int digit = lane * 8, last = digit;
        for (int i = 0; i < 8; i++) {
          digit = lane * 8 + i;
          const uint64 amount = kByMass ? shared.merged_masses[digit] : shared.merged_counts[digit];
          if (amount > 0) last = digit;
          if (before + amount >= goal) break;
          if (i < 7) before += amount;
        }
        if (!reached) {  // the sums before the last occupied digit
          digit = last;
          before = below + upto - own;
          for (int i = lane * 8; i < last; i++) before += kByMass ? shared.merged_masses[i] : shared.merged_counts[i];
        }
        shared.found_digit = digit;
        shared.found_below_mass = before;
        shared.found_count = shared.merged_counts[digit];
        shared.found_mass = shared.merged_masses[digit];
      }
    }
    __syncthreads();
    border.rank |= shared.found_digit << shift;
    below = shared.found_below_mass;
    border.count = shared.found_count;
    border.mass = shared.found_mass;
  }
  border.below_mass = below;
  return border;
}

__device__ __forceinline__ float processed(const Params& p, const SamplingRow& row, int b, int id, float bias) {
  const std::size_t at = static_cast<std::size_t>(b) * p.vocab + id;
  float v = p.logits[at] + bias;
  const uint32_t seen = p.counts ? p.counts[at] : 0;
  if (seen) {
    if (row.repetition_penalty != 1.0f) v = v < 0.0f ? v * row.repetition_penalty : v / row.repetition_penalty;
    const uint32_t count = seen & 0x7fffffffu;
    // Rounded after each operation, as NumPy does.
    v = __fsub_rn(v, __fmul_rn(static_cast<float>(count), row.frequency_penalty));
    if (count) v = __fsub_rn(v, row.presence_penalty);
  }
  if (p.token_mask && row.use_mask) {
    const uint32_t word = p.token_mask[static_cast<std::size_t>(b) * ceil_div(p.vocab, 32) + id / 32];
    if (!(word >> (id & 31) & 1u)) v = -INFINITY;
  }
  return v;
}

// The token at `share` of the mass of the candidates, in the order of ids: shared.token of the block that has it, -1 in
// the others. Of the tokens at the border's rank only the first `max_ties` are candidates.
__device__ void draw(Shared& shared, const Cluster& cluster, const Scores& scores, int first_id, uint32_t limit,
                     uint64 max_ties, float min_weight, double share, bool count_ties) {
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  const int segment = ceil_div(ceil_div(scores.count, kWarps), 32) * 32;  // consecutive scores of a warp
  const int begin = min(scores.count, warp * segment), end = min(scores.count, begin + segment);
  uint64 ties_before = 0;
  if (count_ties) {
    uint64 ties = 0;
    for (int i = begin + lane; i < end; i += 32) ties += scores.rank(scores.values[i]) == limit;
    ties = warp_sum64(ties);
    if (lane == 0) shared.warp_ties[warp] = ties;
    cluster_combine<Combine::sum>(shared, cluster, lane == 0 ? ties : 0, 3);
    for (int r = 0; r < cluster.rank; r++) ties_before += cluster.load(&shared.exchanged[3], r);
    for (int w = 0; w < warp; w++) ties_before += shared.warp_ties[w];
  }
  // The mass of score i, which is scores 32 j + lane of the warp's segment: called by whole warps, in order.
  const auto candidate_mass = [&](int i, uint64& ties_seen) -> uint64 {
    const float score = i < end ? scores.values[i] : -INFINITY;
    const uint32_t rank = scores.rank(score);
    bool kept = rank <= limit && rank != kMaskedRank && scores.weight(score) >= min_weight;
    if (count_ties) {
      const unsigned tied = __ballot_sync(kAllLanes, rank == limit);
      if (rank == limit) kept = kept && ties_seen + __popc(tied & ((1u << lane) - 1)) < max_ties;
      ties_seen += __popc(tied);
    }
    return kept ? scores.mass(score) : 0;
  };
  uint64 own = 0, ties_seen = ties_before;
  for (int i = begin; i < end; i += 32) own += candidate_mass(i + lane, ties_seen);
  own = warp_sum64(own);
  if (lane == 0) shared.warp_masses[warp] = own;
  const uint64 total = cluster_combine<Combine::sum>(shared, cluster, lane == 0 ? own : 0, 4);
  // Never at the end itself, where rounding could take it.
  uint64 goal = static_cast<uint64>(share * static_cast<double>(total));
  if (goal >= total) goal = total - 1;
  uint64 before = 0;
  for (int r = 0; r < cluster.rank; r++) before += cluster.load(&shared.exchanged[4], r);
  for (int w = 0; w < warp; w++) before += shared.warp_masses[w];
  if (threadIdx.x == 0) shared.token = -1;
  __syncthreads();
  if (goal >= before && goal < before + own) {
    ties_seen = ties_before;
    for (int i = begin; i < end; i += 32) {
      const uint64 mass = candidate_mass(i + lane, ties_seen);
      uint64 upto = mass;
#pragma unroll
      for (int s = 1; s < 32; s <<= 1) {
        const uint64 lower = __shfl_up_sync(kAllLanes, upto, s);
        if (lane >= s) upto += lower;
      }
      const unsigned past = __ballot_sync(kAllLanes, before + upto > goal);
      if (past) {
        if (lane == 0) shared.token = first_id + i + __ffs(past) - 1;
        break;
      }
      before += __shfl_sync(kAllLanes, upto, 31);
    }
  }
  __syncthreads();
}

__global__ void __launch_bounds__(kThreads, 1) sampling_kernel(const Params p) {
  extern __shared__ float dynamic_scores[];
  __shared__ Shared shared;
  start_dependents();
  wait_for_predecessor();
  const Cluster cluster = {static_cast<int>(blockIdx.x), static_cast<int>(gridDim.x)};
  const int b = blockIdx.y;
  if (!is_active(p.next.state, b)) return;  // the whole cluster
  const SamplingRow row = p.rows[b];
  const int first_id = min(p.vocab, cluster.rank * p.share), count = min(p.share, p.vocab - first_id);
  float* own = p.in_shared ? dynamic_scores : p.scores + static_cast<std::size_t>(b) * p.vocab + first_id;

  for (int i = threadIdx.x; i < count; i += kThreads) own[i] = processed(p, row, b, first_id + i, 0.0f);
  __syncthreads();
  for (int i = threadIdx.x; i < min(row.num_bias, p.max_bias); i += kThreads) {
    const std::size_t at = static_cast<std::size_t>(b) * p.max_bias + i;
    const int id = p.bias_ids[at];
    if (id >= first_id && id < first_id + count) own[id - first_id] = processed(p, row, b, id, p.bias_values[at]);
  }
  __syncthreads();
  uint64 key = 0;
  for (int i = threadIdx.x; i < count; i += kThreads) key = larger(key, max_key(own[i], first_id + i));
  key = cluster_combine<Combine::max>(shared, cluster, key, 0);
  const uint32_t best_bits = static_cast<uint32_t>(key >> 32);
  const int best_id = static_cast<int>(key_index(key));
  const bool finite = best_bits < 0xff800000u && best_bits > 0x007fffffu;  // between -inf and inf, as max_key orders
  const float best = __uint_as_float(best_bits & 0x80000000u ? best_bits & 0x7fffffffu : ~best_bits);

  if (!finite || row.temperature <= 0.0f) {
    if (threadIdx.x == 0) shared.token = cluster.rank == 0 ? (finite ? best_id : -2) : -1;
    __syncthreads();
  } else {
    const Scores scores = {own, count, best, 1.0f / fmaxf(row.temperature, kMinTemperature)};
    uint32_t limit = kFarRank;
    int pass = 0;
    if (row.top_k > 0 && row.top_k < p.vocab) {
      limit = select_border<false>(shared, cluster, scores, limit, row.top_k, pass).rank;
    }
    uint64 max_ties = 0;
    bool count_ties = false;
    if (row.top_p < 1.0f) {
      uint64 total = 0;
      for (int i = threadIdx.x; i < count; i += kThreads) {
        if (scores.rank(own[i]) <= limit) total += scores.mass(own[i]);  // a masked score has none
      }
      total = cluster_combine<Combine::sum>(shared, cluster, total, 1);
      const uint64 goal =
          max(1ull, static_cast<uint64>(ceil(static_cast<double>(row.top_p) * static_cast<double>(total))));
      const Border border = select_border<true>(shared, cluster, scores, limit, goal, pass);
      limit = border.rank;
      const uint64 each = max(1ull, border.mass / max(1ull, border.count));
      max_ties = goal > border.below_mass ? (goal - border.below_mass + each - 1) / each : 1;
      count_ties = max_ties < border.count;
    }
    draw(shared, cluster, scores, first_id, limit, max_ties, row.min_p, uniform(row.seed, row.draw_index), count_ties);
  }

  float log_total = 0.0f;  // log-sum-exp of the model's own logits
  if (p.logprobs) {
    const float* logits = p.logits + static_cast<std::size_t>(b) * p.vocab + first_id;
    uint64 top = 0;
    for (int i = threadIdx.x; i < count; i += kThreads) top = larger(top, max_key(logits[i], first_id + i));
    top = cluster_combine<Combine::max>(shared, cluster, top, 5);
    const uint32_t bits = static_cast<uint32_t>(top >> 32);
    const float largest = __uint_as_float(bits & 0x80000000u ? bits & 0x7fffffffu : ~bits);
    uint64 mass = 0;
    for (int i = threadIdx.x; i < count; i += kThreads) {
      mass += __float2ull_rn(expf(logits[i] - largest) * kWeightUnit);
    }
    mass = cluster_combine<Combine::sum>(shared, cluster, mass, 6);
    log_total = largest + static_cast<float>(log(static_cast<double>(mass) / static_cast<double>(kWeightUnit)));
  }

  const int token = shared.token;
  if (token != -1) {  // one block of the cluster
    const int chosen = token == -2 ? -1 : token;
    if (threadIdx.x == 0) {
      const std::size_t at = static_cast<std::size_t>(b) * p.vocab + chosen;
      if (chosen >= 0) {
        if (p.logprobs) p.logprobs[b] = p.logits[at] - log_total;
        if (p.counts) p.counts[at] += 1;
      }
      p.rows[b].draw_index = row.draw_index + 1;
    }
    finish_token(p.next, b, chosen);
  }
  cluster.barrier();  // no block may leave while others read its shared memory
}

}  // namespace

void sample_async(const SamplingArgs& args, cudaStream_t stream, bool pdl) {
  assert(args.batch >= 1 && args.vocab >= 1);
  const bool cluster = device_traits().has_dependent_launch;
  const int size = cluster ? kClusterSize : 1;
  Params p = {};
  p.logits = args.logits;
  p.scores = args.scores;
  p.rows = args.rows;
  p.counts = args.counts;
  p.bias_ids = args.bias_ids;
  p.bias_values = args.bias_values;
  p.token_mask = args.token_mask;
  p.logprobs = args.logprobs;
  p.max_bias = args.bias_ids ? args.max_bias : 0;
  p.vocab = args.vocab;
  p.share = ceil_div(args.vocab, size);
  p.next = next_step(args.state, args.table, args.embed_scale, args.residual, args.residual_bf16);
  const std::size_t wanted = static_cast<std::size_t>(p.share) * sizeof(float);
  int limit = 0, device = 0;
  EDGELLM_CUDA_TRY(cudaGetDevice(&device));
  EDGELLM_CUDA_TRY(cudaDeviceGetAttribute(&limit, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
  p.in_shared = wanted + sizeof(Shared) + 1024 <= static_cast<std::size_t>(limit);
  const std::size_t shared_bytes = p.in_shared ? wanted : 0;
  EDGELLM_CUDA_TRY(cudaFuncSetAttribute(sampling_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                        static_cast<int>(shared_bytes)));
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(size, args.batch);
  config.blockDim = dim3(kThreads);
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  cudaLaunchAttribute attributes[2] = {};
  if (cluster) {
    attributes[config.numAttrs].id = cudaLaunchAttributeClusterDimension;
    attributes[config.numAttrs++].val.clusterDim = {kClusterSize, 1, 1};
    if (pdl) {
      attributes[config.numAttrs].id = cudaLaunchAttributeProgrammaticStreamSerialization;
      attributes[config.numAttrs++].val.programmaticStreamSerializationAllowed = 1;
    }
  }
  config.attrs = attributes;
  EDGELLM_CUDA_TRY(cudaLaunchKernelEx(&config, sampling_kernel, p));
  EDGELLM_CUDA_TRY(cudaGetLastError());
}

}  // namespace edgellm::kernels
