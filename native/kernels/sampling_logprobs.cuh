// Log-probabilities under the model's own distribution: the drawn token's, and the most likely tokens'.
#pragma once

#include "sampling_scores.cuh"

namespace edgellm::kernels {

struct LogprobsShared {
  uint64 keys[kMaxTopLogprobs];  // the block's largest logits, falling, as max_key; 0: no more
};

// The largest key below `bound` among the thread's share of `logits` (count).
__device__ __forceinline__ uint64 largest_below(const float* logits, int count, int first_id, uint64 bound) {
  uint64 key = 0;
  for (int i = threadIdx.x; i < count; i += kSamplingThreads) {
    const uint64 candidate = max_key(__ldcg(logits + i), first_id + i);
    if (candidate < bound) key = larger(key, candidate);
  }
  return key;
}

// Fills `record` (in the history) but for the drawn token's own logprob; returns the log-sum-exp of all logits. By the
// whole cluster.
__device__ inline float write_top_logprobs(LogprobsShared& shared, Exchange& exchange, const Cluster& cluster,
                                           const float* logits, int count, int first_id, int num_top,
                                           const DecodeState& state, TokenLogprobs* record) {
  uint64 own = largest_below(logits, count, first_id, ~0ull);
  const float largest = key_value(cluster_combine<Combine::max>(exchange, cluster, own, 5));
  uint64 mass = 0;
  for (int i = threadIdx.x; i < count; i += kSamplingThreads) {
    mass += __float2ull_rn(expf(__ldcg(logits + i) - largest) * kWeightUnit);
  }
  mass = cluster_combine<Combine::sum>(exchange, cluster, mass, 6);
  const float log_total =
      largest + static_cast<float>(log(static_cast<double>(mass) / static_cast<double>(kWeightUnit)));
  if (num_top == 0) {
    if (cluster.rank == 0 && threadIdx.x == 0) record->num_top = 0;
    return log_total;
  }

  for (int n = 0; n < num_top; n++) {
    const uint64 best = block_combine<Combine::max>(exchange, own);
    if (threadIdx.x == 0) shared.keys[n] = best;
    if (best != 0 && own == best) own = largest_below(logits, count, first_id, best);
  }
  cluster.barrier();
  if (cluster.rank == 0 && threadIdx.x < 32) {  // lane r walks down the list of block r
    const int lane = threadIdx.x;
    const bool reads = lane < cluster.size;
    int next = 0, found = 0;
    uint64 head = reads ? cluster.load(&shared.keys[0], lane) : 0;
    for (; found < num_top; found++) {
      uint64 best = head;
#pragma unroll
      for (int s = 16; s >= 1; s >>= 1) best = larger(best, __shfl_xor_sync(kAllLanes, best, s));
      if (best == 0) break;
      if (reads && head == best) head = ++next < num_top ? cluster.load(&shared.keys[next], lane) : 0;
      __syncwarp();
      if (lane == 0) {
        record->top_ids[found] = token_of(state, static_cast<int>(key_index(best)));
        record->top_logprobs[found] = key_value(best) - log_total;
      }
    }
    if (lane == 0) record->num_top = found;
  }
  return log_total;
}

}  // namespace edgellm::kernels
