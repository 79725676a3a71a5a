// The draw among any number of tokens: top-k's and top-p's borders by radix selection, then a walk in the order of ids.
#pragma once

#include "sampling_scores.cuh"

namespace edgellm::kernels {

constexpr int kDigits = 256;

// A pass's histogram; two take turns, so that one is read by other blocks while the next is filled.
struct Histogram {
  uint64 masses[kDigits];
  uint32_t counts[kDigits];
};

struct SelectionShared {
  Histogram histograms[2];
  uint64 merged[kDigits];  // counts or masses, whichever decides
  uint32_t merged_counts[kDigits];
  uint64 warp_masses[kSamplingWarps];
  uint64 warp_ties[kSamplingWarps];
  uint64 found_below, found_mass;
  uint32_t found_digit, found_count;
};

struct Border {
  uint32_t rank;
  uint64 below;    // count (or mass) of the ranks before it
  uint32_t count;  // of tokens that have it
  uint64 mass;     // of them together; 0 when counts decide
};

// The lowest rank up to which the tokens' count (or mass) reaches `goal`, among ranks up to `limit`: a radix selection,
// eight bits a pass. `pass` counts the passes of all selections.
template <bool kByMass>
__device__ Border select_border(SelectionShared& shared, const Cluster& cluster, const Scores& scores, uint32_t limit,
                                uint64 goal, int& pass) {
  Border border = {0, 0, 0, 0};
  for (int shift = 24; shift >= 0; shift -= 8, pass++) {
    Histogram& histogram = shared.histograms[pass & 1];
    for (int i = threadIdx.x; i < kDigits; i += kSamplingThreads) histogram.masses[i] = histogram.counts[i] = 0;
    __syncthreads();
    for (int i = threadIdx.x; i < scores.count; i += kSamplingThreads) {
      const uint32_t rank = scores.rank(scores.values[i]);
      if (rank > limit || rank == kMaskedRank) continue;
      if (shift < 24 && rank >> (shift + 8) != border.rank >> (shift + 8)) continue;
      const uint32_t digit = (rank >> shift) & (kDigits - 1);
      if (!kByMass || shift == 0) atomicAdd(&histogram.counts[digit], 1u);  // of masses, only the border's is needed
      if (kByMass) shared_add64(&histogram.masses[digit], scores.mass(scores.values[i]));
    }
    cluster.barrier();
    if (threadIdx.x < kDigits) {
      uint32_t count = 0;
      uint64 mass = 0;
      for (int r = 0; r < cluster.size; r++) {
        count += cluster.load(&histogram.counts[threadIdx.x], r);
        if (kByMass) mass += cluster.load(&histogram.masses[threadIdx.x], r);
      }
      shared.merged_counts[threadIdx.x] = count;
      shared.merged[threadIdx.x] = kByMass ? mass : count;
    }
    __syncthreads();
    if (threadIdx.x < 32) {  // a lane has eight digits
      const int lane = threadIdx.x;
      uint64 own = 0;
      for (int i = 0; i < 8; i++) own += shared.merged[lane * 8 + i];
      const uint64 upto = warp_running_sum64(own, lane);
      const unsigned reached = __ballot_sync(kAllLanes, border.below + upto >= goal);
      // Rounding may put the goal a little past the end: then the last digit that has tokens.
      const unsigned occupied = __ballot_sync(kAllLanes, own > 0);
      const int owner = reached ? __ffs(reached) - 1 : 31 - __clz(occupied | 1u);
      if (lane == owner) {
        uint64 before = border.below + upto - own;
        int digit = lane * 8, last = digit;
        for (int i = 0; i < 8; i++) {
          digit = lane * 8 + i;
          const uint64 amount = shared.merged[digit];
          if (amount > 0) last = digit;
          if (before + amount >= goal) break;
          if (i < 7) before += amount;
        }
        if (!reached) {  // the sums before the last occupied digit
          digit = last;
          before = border.below + upto - own;
          for (int i = lane * 8; i < last; i++) before += shared.merged[i];
        }
        shared.found_digit = digit;
        shared.found_below = before;
        shared.found_count = shared.merged_counts[digit];
        shared.found_mass = shared.merged[digit];
      }
    }
    __syncthreads();
    border = {border.rank | shared.found_digit << shift, shared.found_below, shared.found_count, shared.found_mass};
  }
  return border;
}

// Which tokens can be drawn: ranks up to `limit`, of those at the limit the first `max_ties` ids if `count_ties`, and a
// mass of at least `min_mass`.
struct Candidacy {
  uint32_t limit;
  bool count_ties;
  uint64 max_ties;
  uint64 min_mass;
};

// Top-k, then top-p, as the row has them.
__device__ inline Candidacy select(SelectionShared& shared, Exchange& exchange, const Cluster& cluster,
                                   const Scores& scores, const SamplingRow& row, int vocab, uint64 min_mass) {
  Candidacy candidacy = {kFarRank, false, 0, min_mass};
  int pass = 0;
  if (row.top_k > 0 && row.top_k < vocab) {
    candidacy.limit = select_border<false>(shared, cluster, scores, candidacy.limit, row.top_k, pass).rank;
  }
  if (row.top_p >= 1.0f) return candidacy;
  uint64 total = 0;
  for (int i = threadIdx.x; i < scores.count; i += kSamplingThreads) {
    if (scores.rank(scores.values[i]) <= candidacy.limit) total += scores.mass(scores.values[i]);  // masked: none
  }
  total = cluster_combine<Combine::sum>(exchange, cluster, total, 1);
  const uint64 goal = nucleus_goal(row.top_p, total);
  const Border border = select_border<true>(shared, cluster, scores, candidacy.limit, goal, pass);
  const uint64 each = max(1ull, border.mass / max(1u, border.count));
  candidacy.limit = border.rank;
  candidacy.max_ties = goal > border.below ? (goal - border.below + each - 1) / each : 1;
  candidacy.count_ties = candidacy.max_ties < border.count;
  return candidacy;
}

// The token at `share` of the candidates' mass, in the order of ids; -1 in every block but the one that has it.
// `token` is in shared memory.
__device__ inline void draw(SelectionShared& shared, Exchange& exchange, const Cluster& cluster, const Scores& scores,
                            const Candidacy& candidacy, const double& share, int* token) {
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  const int segment = ceil_div(ceil_div(scores.count, kSamplingWarps), 32) * 32;  // consecutive scores of a warp
  const int begin = min(scores.count, warp * segment), end = min(scores.count, begin + segment);
  uint64 ties_before = 0;
  if (candidacy.count_ties) {
    uint64 ties = 0;
    for (int i = begin + lane; i < end; i += 32) ties += scores.rank(scores.values[i]) == candidacy.limit;
    ties = warp_sum64(ties);
    if (lane == 0) shared.warp_ties[warp] = ties;
    cluster_combine<Combine::sum>(exchange, cluster, lane == 0 ? ties : 0, 3);
    for (int r = 0; r < cluster.rank; r++) ties_before += cluster.load(&exchange.block_values[3], r);
    for (int w = 0; w < warp; w++) ties_before += shared.warp_ties[w];
  }
  // The mass of score i, which is scores 32 j + lane of the warp's segment: called by whole warps, in order.
  const auto candidate_mass = [&](int i, uint64& ties_seen) -> uint64 {
    const float score = i < end ? scores.values[i] : -INFINITY;
    const uint32_t rank = scores.rank(score);
    bool kept = rank <= candidacy.limit && rank != kMaskedRank;
    if (candidacy.count_ties) {
      const unsigned tied = __ballot_sync(kAllLanes, rank == candidacy.limit);
      if (rank == candidacy.limit) {
        kept = kept && ties_seen + __popc(tied & ((1u << lane) - 1)) < candidacy.max_ties;
      }
      ties_seen += __popc(tied);
    }
    const uint64 mass = kept ? scores.mass(score) : 0;
    return mass >= candidacy.min_mass ? mass : 0;
  };
  uint64 own = 0, ties_seen = ties_before;
  for (int i = begin; i < end; i += 32) own += candidate_mass(i + lane, ties_seen);
  own = warp_sum64(own);
  if (lane == 0) shared.warp_masses[warp] = own;
  const uint64 total = cluster_combine<Combine::sum>(exchange, cluster, lane == 0 ? own : 0, 4);
  const uint64 goal = draw_goal(share, total);
  uint64 before = 0;
  for (int r = 0; r < cluster.rank; r++) before += cluster.load(&exchange.block_values[4], r);
  for (int w = 0; w < warp; w++) before += shared.warp_masses[w];
  if (threadIdx.x == 0) *token = -1;
  __syncthreads();
  if (goal >= before && goal < before + own) {
    ties_seen = ties_before;
    for (int i = begin; i < end; i += 32) {
      const uint64 mass = candidate_mass(i + lane, ties_seen);
      const uint64 upto = warp_running_sum64(mass, lane);
      const unsigned past = __ballot_sync(kAllLanes, before + upto > goal);
      if (past) {
        if (lane == 0) *token = scores.first_id + i + __ffs(past) - 1;
        break;
      }
      before += __shfl_sync(kAllLanes, upto, 31);
    }
  }
  __syncthreads();
}

}  // namespace edgellm::kernels
