// What a token's score is, how far it lies behind the best, and what it weighs in the draw.
#pragma once

#include <cmath>

#include "edgellm/kernels/sampling.hpp"
#include "sampling_cluster.cuh"
#include "sampling_finish.cuh"

namespace edgellm::kernels {

constexpr float kWeightUnit = 17592186044416.0f;  // 2^44: the sum of 2^19 weights still fits 64 bits
constexpr float kMinTemperature = 1e-6f;
// A score's rank: its distance from the best in units of 2^-26, farther than 63.9 all the same; masked is beyond all.
constexpr uint32_t kFarRank = 0xfffffffeu;
constexpr uint32_t kMaskedRank = 0xffffffffu;

// SamplingArgs as the kernel has them.
struct SamplingInputs {
  const float* logits;
  float* scores;
  SamplingRow* rows;
  uint32_t* counts;
  const int32_t* bias_ids;
  const float* bias_values;
  const uint32_t* token_mask;
  TokenLogprobs* logprobs;
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

struct Scores {
  const float* values;  // this block's share
  int count;
  int first_id;  // of the share
  float best;
  float inverse_temperature;

  __device__ __forceinline__ uint32_t rank(float score) const {
    if (score == -INFINITY) return kMaskedRank;
    const float distance = best - score;
    return distance >= 63.9f ? kFarRank : static_cast<uint32_t>(distance * 67108864.0f);
  }
  // The share of the most likely token's probability, in units of 2^-44.
  __device__ __forceinline__ uint64 mass(float score) const {
    return __float2ull_rn(expf((score - best) * inverse_temperature) * kWeightUnit);
  }
};

// The mass that `top_p` of `total` must be reached with.
__device__ __forceinline__ uint64 nucleus_goal(float top_p, uint64 total) {
  return max(1ull, static_cast<uint64>(ceil(static_cast<double>(top_p) * static_cast<double>(total))));
}

// Where the draw `share` falls in `total`; never at the end itself, where rounding could take it.
__device__ __forceinline__ uint64 draw_goal(double share, uint64 total) {
  return min(static_cast<uint64>(share * static_cast<double>(total)), total - 1);
}

__device__ __forceinline__ bool is_penalised(const SamplingRow& row) {
  return row.repetition_penalty != 1.0f || row.presence_penalty != 0.0f || row.frequency_penalty != 0.0f;
}

// The score of a logit: bias, penalties, mask.
__device__ __forceinline__ float processed(const SamplingInputs& p, const SamplingRow& row, int b, int id, float logit,
                                           float bias) {
  float v = logit + bias;
  if (p.counts && is_penalised(row)) {
    const uint32_t seen = p.counts[static_cast<std::size_t>(b) * p.vocab + id];
    if (seen) {
      if (row.repetition_penalty != 1.0f) v = v < 0.0f ? v * row.repetition_penalty : v / row.repetition_penalty;
      const uint32_t count = seen & 0x7fffffffu;
      // Rounded after each operation, as NumPy does.
      v = __fsub_rn(v, __fmul_rn(static_cast<float>(count), row.frequency_penalty));
      if (count) v = __fsub_rn(v, row.presence_penalty);
    }
  }
  if (p.token_mask && row.use_mask) {
    const uint32_t word = p.token_mask[static_cast<std::size_t>(b) * ceil_div(p.vocab, 32) + id / 32];
    if (!(word >> (id & 31) & 1u)) v = -INFINITY;
  }
  return v;
}

}  // namespace edgellm::kernels
