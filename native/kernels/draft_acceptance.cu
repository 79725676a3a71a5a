// Draft acceptance in one launch: a cluster of blocks draws the target's token at each node, all nodes side by side,
// and the cluster that finishes last walks down the tree.
#include <cassert>
#include <cmath>

#include "edgellm/kernels/draft_acceptance.hpp"
#include "sampling_few.cuh"
#include "sampling_launch.cuh"
#include "sampling_select.cuh"

namespace edgellm::kernels {

namespace {

constexpr int kNotFinite = -2;
constexpr uint64 kCoinStream = 0x636f696e;  // apart from the numbers that draws use

struct Params {
  DraftAcceptanceArgs args;
  unsigned int* num_done;  // (num_sequences), zero between calls
  int32_t* verdicts;       // (num_sequences, max_nodes) the target's token
  int share;               // scores a block
  bool in_shared;
};

struct Shared {
  Exchange exchange;
  SelectionShared selection;
  FewShared few;
  SamplingRow row;
  // Here, because registers are short:
  double share;  // the draw, in [0, 1)
  double coin;   // whether a drafted token is kept, in [0, 1)
  int num_nodes;
  Scores scores;
  int32_t tokens[kMaxAcceptanceNodes];
  int32_t parents[kMaxAcceptanceNodes];
  int32_t verdicts[kMaxAcceptanceNodes];
  int token;  // of the block that has it; -1 in the others
  bool last;
};

// Scores that cannot be drawn become -inf: what is left is the target's distribution. In the order of ids, as the draw.
__device__ void keep_candidates(Shared& shared, const Cluster& cluster, float* own, const Candidacy& candidacy) {
  const Scores& scores = shared.scores;
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  const int segment = ceil_div(ceil_div(scores.count, kSamplingWarps), 32) * 32;
  const int begin = min(scores.count, warp * segment), end = min(scores.count, begin + segment);
  uint64 ties_seen = 0;
  if (candidacy.count_ties) {
    uint64 ties = 0;
    for (int i = begin + lane; i < end; i += 32) ties += scores.rank(own[i]) == candidacy.limit;
    ties = warp_sum64(ties);
    if (lane == 0) shared.selection.warp_ties[warp] = ties;
    cluster_combine<Combine::sum>(shared.exchange, cluster, lane == 0 ? ties : 0, 2);
    for (int r = 0; r < cluster.rank; r++) ties_seen += cluster.load(&shared.exchange.block_values[2], r);
    for (int w = 0; w < warp; w++) ties_seen += shared.selection.warp_ties[w];
  }
  for (int i = begin + lane; i - lane < end; i += 32) {
    const float score = i < end ? own[i] : -INFINITY;
    const uint32_t rank = scores.rank(score);
    bool kept = rank <= candidacy.limit && scores.mass(score) >= candidacy.min_mass;
    if (candidacy.count_ties) {
      const unsigned tied = __ballot_sync(kAllLanes, rank == candidacy.limit);
      if (rank == candidacy.limit) {
        kept = kept && ties_seen + __popc(tied & ((1u << lane) - 1)) < candidacy.max_ties;
      }
      ties_seen += __popc(tied);
    }
    if (i < end && !kept) own[i] = -INFINITY;
  }
  __syncthreads();
}

// Keeps `drafted`, which was drawn from `probs` (this block's share), or draws another; leaves the token as `draw`
// does.
__device__ void keep_or_replace(Shared& shared, const Cluster& cluster, float* own, int drafted, const float* probs,
                                float probability) {
  const Scores& scores = shared.scores;
  uint64 mass = 0, drafted_mass = 0;
  for (int i = threadIdx.x; i < scores.count; i += kSamplingThreads) mass += scores.mass(own[i]);
  const uint64 total = cluster_combine<Combine::sum>(shared.exchange, cluster, mass, 5);
  const int place = drafted - scores.first_id;
  if (threadIdx.x == 0 && place >= 0 && place < scores.count) drafted_mass = scores.mass(own[place]);
  drafted_mass = cluster_combine<Combine::sum>(shared.exchange, cluster, drafted_mass, 6);
  // p of it is drafted_mass / total.
  if (shared.coin * static_cast<double>(probability) * static_cast<double>(total) < static_cast<double>(drafted_mass)) {
    if (threadIdx.x == 0) shared.token = cluster.rank == 0 ? drafted : -1;
    __syncthreads();
    return;
  }
  const auto residual = [&](int i) {  // p - q, in units of mass
    return static_cast<float>(static_cast<double>(scores.mass(own[i])) -
                              static_cast<double>(__ldg(probs + i)) * static_cast<double>(total));
  };
  uint64 key = 0;
  for (int i = threadIdx.x; i < scores.count; i += kSamplingThreads) {
    const float left = residual(i);
    if (left > 0.0f) key = larger(key, max_key(logf(left), scores.first_id + i));
  }
  key = cluster_combine<Combine::max>(shared.exchange, cluster, key, 7);
  if (key != 0) {  // else rounding alone brought us here, and p itself is left
    for (int i = threadIdx.x; i < scores.count; i += kSamplingThreads) {
      const float left = residual(i);
      own[i] = left > 0.0f ? logf(left) : -INFINITY;
    }
    __syncthreads();
    if (threadIdx.x == 0) {
      shared.scores.best = key_value(key);
      shared.scores.inverse_temperature = 1.0f;
    }
    __syncthreads();
  }
  const Candidacy all = {kFarRank, false, 0, 0};
  draw(shared.selection, shared.exchange, cluster, scores, all, shared.share, &shared.token);
}

// From node 0 down, by the first warp; then the results, by the block.
__device__ void walk(Shared& shared, const Params& p) {
  const DraftAcceptanceArgs& args = p.args;
  const int sequence = blockIdx.z, num_nodes = shared.num_nodes;
  const std::size_t first = static_cast<std::size_t>(sequence) * args.max_nodes;
  if (threadIdx.x < num_nodes) shared.verdicts[threadIdx.x] = __ldcg(p.verdicts + first + threadIdx.x);
  __syncthreads();
  if (threadIdx.x >= 32) return;
  const int lane = threadIdx.x;
  int node = 0, length = 0;
  while (true) {
    if (lane == 0) args.paths[first + length] = node;
    length++;
    int child = -1;
    for (int base = 0; base < num_nodes && child < 0; base += 32) {
      const int i = base + lane;
      const bool follows =
          i > node && i < num_nodes && shared.parents[i] == node && shared.tokens[i] == shared.verdicts[node];
      const unsigned found = __ballot_sync(kAllLanes, follows);
      if (found) child = base + __ffs(found) - 1;
    }
    if (child < 0) break;
    node = child;
  }
  for (int i = length + lane; i < args.max_nodes; i += 32) args.paths[first + i] = -1;
  if (lane == 0) {
    args.path_lengths[sequence] = length;
    args.next_tokens[sequence] = shared.verdicts[node];
    args.rows[sequence].draw_index = shared.row.draw_index + length;
    p.num_done[sequence] = 0;  // for the next call
  }
}

// The row of a drafted token, -1 where it has none.
__device__ int row_of(const DraftAcceptanceArgs& args, int token) {
  if (!args.row_tokens) return token < args.vocab ? token : -1;
  int first = 0, count = args.vocab;
  while (count > 0) {  // the first row whose token is not lower
    const int half = count / 2;
    if (__ldg(args.row_tokens + first + half) < token) {
      first += half + 1, count -= half + 1;
    } else {
      count = half;
    }
  }
  return first < args.vocab && __ldg(args.row_tokens + first) == token ? first : -1;
}

// This cluster's row of the logits.
__device__ __forceinline__ std::size_t node_row(const DraftAcceptanceArgs& args) {
  return static_cast<std::size_t>(blockIdx.z) * args.max_nodes + blockIdx.y;
}

// The sequence's nodes and parameters, and this node's random numbers, into shared memory. False, in the whole cluster,
// when there is no such node.
__device__ bool load_draft(Shared& shared, const DraftAcceptanceArgs& args) {
  const int sequence = blockIdx.z, node = blockIdx.y, tid = threadIdx.x;
  const int num_nodes = min(__ldcg(args.num_nodes + sequence), args.max_nodes);
  if (node >= num_nodes) return false;
  const std::size_t first = static_cast<std::size_t>(sequence) * args.max_nodes;
  constexpr int kRowWords = sizeof(SamplingRow) / sizeof(uint32_t);
  if (tid < kRowWords) {
    reinterpret_cast<uint32_t*>(&shared.row)[tid] =
        __ldcg(reinterpret_cast<const uint32_t*>(args.rows + sequence) + tid);
  }
  if (tid < num_nodes) {
    shared.tokens[tid] = __ldcg(args.token_ids + first + tid);
    shared.parents[tid] = args.parents ? __ldcg(args.parents + first + tid) : tid - 1;
  }
  __syncthreads();
  if (tid == 0) {
    int depth = 0;
    for (int i = node; i > 0 && shared.parents[i] >= 0 && shared.parents[i] < i; i = shared.parents[i]) depth++;
    shared.num_nodes = num_nodes;
    shared.share = uniform(shared.row.seed, shared.row.draw_index + depth);
    shared.coin = uniform(shared.row.seed ^ kCoinStream, shared.row.draw_index + depth);
  }
  __syncthreads();
  return true;
}

// kProbs: whether there are draft_probs.
template <bool kProbs>
__global__ void __launch_bounds__(kSamplingThreads, 1) accept_draft_kernel(const Params p) {
  extern __shared__ float dynamic_scores[];
  __shared__ Shared shared;
  start_dependents();
  wait_for_predecessor();
  const DraftAcceptanceArgs& args = p.args;
  const Cluster cluster = {static_cast<int>(blockIdx.x), static_cast<int>(gridDim.x)};
  if (!load_draft(shared, args)) return;  // the whole cluster
  const SamplingRow& row = shared.row;
  const int first_id = min(args.vocab, cluster.rank * p.share), count = min(p.share, args.vocab - first_id);
  const std::size_t at = node_row(args) * args.vocab + first_id;
  float* own = p.in_shared ? dynamic_scores : args.scores + at;
  uint64 key = 0;
  for (int i = threadIdx.x; i < count; i += kSamplingThreads) {
    const float score = __ldcg(args.logits + at + i);
    own[i] = score;
    key = larger(key, max_key(score, first_id + i));
  }
  __syncthreads();
  const float own_best = key ? key_value(key) : -INFINITY;
  key = cluster_combine<Combine::max>(shared.exchange, cluster, key, 0);
  const uint32_t best_bits = static_cast<uint32_t>(key >> 32);
  const bool finite = best_bits < 0xff800000u && best_bits > 0x007fffffu;  // between -inf and inf, as max_key orders

  if (!finite || row.temperature <= 0.0f) {
    if (threadIdx.x == 0) {
      shared.token = cluster.rank == 0 ? (finite ? static_cast<int>(key_index(key)) : kNotFinite) : -1;
    }
    __syncthreads();
  } else {
    if (threadIdx.x == 0) {
      shared.scores = {own, count, first_id, key_value(key), 1.0f / fmaxf(row.temperature, kMinTemperature)};
    }
    __syncthreads();
    const Scores& scores = shared.scores;
    const uint64 min_mass = static_cast<uint64>(ceil(static_cast<double>(row.min_p) * kWeightUnit));
    const int child = static_cast<int>(blockIdx.y) + 1;  // of a chain
    const int drafted = kProbs && child < shared.num_nodes ? row_of(args, shared.tokens[child]) : -1;
    if (kProbs && drafted >= 0) {
      const Candidacy candidacy = select(shared.selection, shared.exchange, cluster, scores, row, args.vocab, min_mass);
      keep_candidates(shared, cluster, const_cast<float*>(shared.scores.values), candidacy);
      const float* probs = args.draft_probs + (node_row(args) + 1) * args.vocab;
      keep_or_replace(shared, cluster, const_cast<float*>(shared.scores.values), drafted,
                      probs + shared.scores.first_id, __ldg(probs + drafted));
    } else if (!draw_among_few(shared.few, shared.exchange, cluster, scores, row, args.vocab, own_best, min_mass,
                               shared.share, &shared.token)) {
      const Candidacy candidacy = select(shared.selection, shared.exchange, cluster, scores, row, args.vocab, min_mass);
      draw(shared.selection, shared.exchange, cluster, scores, candidacy, shared.share, &shared.token);
    }
  }

  if (shared.token != -1) {  // one block of the cluster
    if (threadIdx.x == 0) {
      const int row = shared.token;
      p.verdicts[node_row(args)] = row == kNotFinite ? -1 : args.row_tokens ? __ldg(args.row_tokens + row) : row;
      __threadfence();
      shared.last = atomicAdd(p.num_done + blockIdx.z, 1u) == static_cast<unsigned int>(shared.num_nodes) - 1;
      __threadfence();
    }
    __syncthreads();
    if (shared.last) walk(shared, p);
  }
  cluster.barrier();  // no block may leave while others read its shared memory
}

std::size_t verdicts_start() { return kMaxAcceptanceSequences * sizeof(unsigned int); }

}  // namespace

std::size_t draft_acceptance_workspace_bytes(int max_sequences, int max_nodes) {
  return verdicts_start() + static_cast<std::size_t>(max_sequences) * max_nodes * sizeof(int32_t);
}

void accept_draft_async(const DraftAcceptanceArgs& args, cudaStream_t stream, bool pdl) {
  assert(args.num_sequences >= 1 && args.num_sequences <= kMaxAcceptanceSequences && args.vocab >= 1);
  assert(args.max_nodes >= 1 && args.max_nodes <= kMaxAcceptanceNodes);
  assert(!args.draft_probs || !args.parents);
  const auto kernel = args.draft_probs ? accept_draft_kernel<true> : accept_draft_kernel<false>;
  const RowBlocks blocks = blocks_of_row(reinterpret_cast<const void*>(kernel), args.vocab, sizeof(Shared));
  Params p = {};
  p.args = args;
  p.num_done = static_cast<unsigned int*>(args.workspace);
  p.verdicts = reinterpret_cast<int32_t*>(static_cast<char*>(args.workspace) + verdicts_start());
  p.share = blocks.share;
  p.in_shared = blocks.in_shared;
  launch_row_blocks(kernel, blocks, static_cast<unsigned>(args.max_nodes), static_cast<unsigned>(args.num_sequences),
                    stream, pdl, p);
}

}  // namespace edgellm::kernels
