// The draw where few tokens decide it: they are gathered in one block, which compares each with each.
//
// A sequence's threads each know the best of their own scores. The k-th best of those is no better than the k-th best
// score, and few others lie above it, so a histogram of one entry a thread gives a border that top-k, and mostly top-p
// too, is decided within. Gives exactly what sampling_select.cuh gives.
#pragma once

#include "sampling_scores.cuh"

namespace edgellm::kernels {

constexpr int kMaxFew = 512;      // tokens that are compared each with each
constexpr int kMostWanted = 256;  // tokens that the border is set to contain; those below it that come along are more
constexpr int kBins = 256;        // of the histogram
constexpr int kBinShift = 22;     // a bin is 1/16 wide; the last one has all beyond 15.9
constexpr uint64 kIdMask = 0xffffffffull;

struct alignas(16) FewToken {
  uint64 key;   // rank, then id
  uint64 mass;  // 0: cannot be drawn
};

struct FewShared {
  uint32_t bins[kBins];
  uint32_t merged[kBins];
  FewToken own[kMaxFew];  // this block's
  FewToken all[kMaxFew];  // the sequence's, in block 0
  uint64 own_mass;        // of `own`
  uint64 block_mass;      // of all tokens of the block; only for top-p without top-k
  uint32_t num_own;       // may exceed kMaxFew, and then `own` lacks some
  uint32_t limit;
};

// How many tokens the border must contain to decide top-k or top-p; 0: nothing to decide, or too many.
__device__ __forceinline__ int few_wanted(const SamplingRow& row, int vocab) {
  if (row.top_k > 0 && row.top_k < vocab) return row.top_k <= kMostWanted ? row.top_k : 0;
  return row.top_p < 1.0f ? kMostWanted : 0;
}

// The upper end of the bin in which the `wanted`-th best of the threads' best scores lies. By the whole cluster.
__device__ inline uint32_t coarse_limit(FewShared& shared, const Cluster& cluster, uint32_t best_rank, int wanted) {
  for (int i = threadIdx.x; i < kBins; i += kSamplingThreads) shared.bins[i] = 0;
  if (threadIdx.x == 0) shared.own_mass = shared.num_own = 0;
  __syncthreads();
  if (best_rank != kMaskedRank) atomicAdd(&shared.bins[min(best_rank >> kBinShift, kBins - 1u)], 1u);
  cluster.barrier();
  if (threadIdx.x < kBins) {
    uint32_t count = 0;
    for (int r = 0; r < cluster.size; r++) count += cluster.load(&shared.bins[threadIdx.x], r);
    shared.merged[threadIdx.x] = count;
  }
  __syncthreads();
  if (threadIdx.x < 32) {  // a lane has eight bins
    const int lane = threadIdx.x;
    uint32_t own = 0;
    for (int i = 0; i < 8; i++) own += shared.merged[lane * 8 + i];
    uint32_t upto = own;
#pragma unroll
    for (int s = 1; s < 32; s <<= 1) {
      const uint32_t before = __shfl_up_sync(kAllLanes, upto, s);
      if (lane >= s) upto += before;
    }
    const unsigned reached = __ballot_sync(kAllLanes, upto >= static_cast<uint32_t>(wanted));
    if (lane == (reached ? __ffs(reached) - 1 : 31)) {
      uint32_t count = upto - own;
      int bin = lane * 8;
      while (bin < lane * 8 + 7 && count + shared.merged[bin] < static_cast<uint32_t>(wanted)) {
        count += shared.merged[bin++];
      }
      shared.limit = reached && bin < kBins - 1 ? (static_cast<uint32_t>(bin + 1) << kBinShift) - 1 : kFarRank;
    }
  }
  __syncthreads();
  return shared.limit;
}

// Draws as `select` and `draw` of sampling_select.cuh do, and leaves the token likewise: -1 in every block but one.
// False, in the whole cluster, when the few do not decide it; then nothing was drawn. `best_score` is the thread's own.
__device__ inline bool draw_among_few(FewShared& shared, Exchange& exchange, const Cluster& cluster,
                                      const Scores& scores, const SamplingRow& row, int vocab, float best_score,
                                      uint64 min_mass, const double& share, int* token) {
  const int wanted = few_wanted(row, vocab);
  if (wanted == 0) return false;
  const bool has_top_k = row.top_k > 0 && row.top_k < vocab, has_top_p = row.top_p < 1.0f;
  const uint32_t best_rank = scores.rank(best_score);
  const uint32_t limit = coarse_limit(shared, cluster, best_rank, wanted);

  if (best_rank <= limit) {  // else all of the thread's scores lie behind
    for (int i = threadIdx.x; i < scores.count; i += kSamplingThreads) {
      const float score = scores.values[i];
      const uint32_t rank = scores.rank(score);
      if (rank > limit) continue;
      const uint32_t place = atomicAdd(&shared.num_own, 1u);
      if (place >= kMaxFew) continue;
      const uint64 mass = scores.mass(score);
      shared.own[place] = {static_cast<uint64>(rank) << 32 | static_cast<uint32_t>(scores.first_id + i), mass};
      if (has_top_p && !has_top_k) shared_add64(&shared.own_mass, mass);
    }
  }
  if (has_top_p && !has_top_k) {
    uint64 mass = 0;
    for (int i = threadIdx.x; i < scores.count; i += kSamplingThreads) mass += scores.mass(scores.values[i]);
    mass = block_combine<Combine::sum>(exchange, mass);
    if (threadIdx.x == 0) shared.block_mass = mass;
  }
  if (threadIdx.x == 0) *token = -1;
  cluster.barrier();

  uint32_t num_few = 0;
  uint64 few_mass = 0, total = 0;
  for (int r = 0; r < cluster.size; r++) {
    num_few += cluster.load(&shared.num_own, r);
    if (!has_top_p || has_top_k) continue;
    few_mass += cluster.load(&shared.own_mass, r);
    total += cluster.load(&shared.block_mass, r);
  }
  if (num_few > kMaxFew) return false;
  if (has_top_p && !has_top_k && few_mass < nucleus_goal(row.top_p, total)) return false;
  if (cluster.rank != 0) return true;

  int first = 0;
  for (int r = 0; r < cluster.size; r++) {
    const int count = cluster.load(&shared.num_own, r);
    for (int i = threadIdx.x; i < count; i += kSamplingThreads) {
      shared.all[first + i] = {cluster.load(&shared.own[i].key, r), cluster.load(&shared.own[i].mass, r)};
    }
    first += count;
  }
  if (threadIdx.x == 0) shared.limit = kFarRank;
  __syncthreads();
  const int me = threadIdx.x, num = static_cast<int>(num_few);
  FewToken mine = me < num ? shared.all[me] : FewToken{~0ull, 0};
  int place = 0;
  uint64 mass_before = 0;
  if (me < num) {
    for (int j = 0; j < num; j++) {
      const FewToken other = shared.all[j];
      if (other.key < mine.key) place++, mass_before += other.mass;
    }
  }
  if (has_top_k) {
    if (me < num && place == row.top_k - 1) shared.limit = static_cast<uint32_t>(mine.key >> 32);
    __syncthreads();
    if (static_cast<uint32_t>(mine.key >> 32) > shared.limit) mine.mass = 0;
    if (has_top_p) total = block_combine<Combine::sum>(exchange, mine.mass);
  }
  if (has_top_p && mass_before >= nucleus_goal(row.top_p, total)) mine.mass = 0;
  if (mine.mass < min_mass) mine.mass = 0;
  __syncthreads();  // the others may still read the masses as they were
  if (me < num) shared.all[me].mass = mine.mass;
  const uint64 goal = draw_goal(share, block_combine<Combine::sum>(exchange, mine.mass));
  if (me < num && mine.mass > 0) {
    uint64 before = 0;
    for (int j = 0; j < num; j++) {
      const FewToken other = shared.all[j];
      if ((other.key & kIdMask) < (mine.key & kIdMask)) before += other.mass;
    }
    if (goal >= before && goal < before + mine.mass) *token = static_cast<int>(mine.key & kIdMask);
  }
  __syncthreads();
  return true;
}

}  // namespace edgellm::kernels
