// Sampling as edgellm_ros/runtime/sampling.py defines it, one cluster of blocks a sequence, in one launch.
//
// Order: bias, repetition, frequency and presence penalty, mask, temperature, top-k, top-p, min-p; the draw is a number
// from (seed, index) and falls on the tokens in the order of their ids. Each block keeps its share of the scores in
// shared memory. Every sum is over integers (weights in units of 2^-44 of the largest): the result does not depend on
// the order in which threads add, and the same request and seed give the same token on any GPU with the same logits.
#include <cassert>
#include <cmath>

#include "edgellm/kernels/sampling.hpp"
#include "sampling_few.cuh"
#include "sampling_launch.cuh"
#include "sampling_logprobs.cuh"
#include "sampling_select.cuh"

namespace edgellm::kernels {

namespace {

constexpr int kNotFinite = -2;

struct Shared {
  Exchange exchange;
  SelectionShared selection;
  FewShared few;
  LogprobsShared logprobs;
  SamplingRow row;
  double share;  // the draw, in [0, 1)
  int token;     // of the block that has it; -1 in the others
};

// kEverything: also penalties, bias, mask and log-probabilities, where the row has them.
template <bool kEverything>
__device__ void load_scores(const SamplingInputs& p, const SamplingRow& row, int b, int first_id, int count,
                            float* own) {
  constexpr int kInFlight = kEverything ? 4 : 8;  // loads a thread
  const float* logits = p.logits + static_cast<std::size_t>(b) * p.vocab + first_id;
  for (int begin = threadIdx.x; begin < count; begin += kInFlight * kSamplingThreads) {
    float values[kInFlight];
#pragma unroll
    for (int u = 0; u < kInFlight; u++) {
      const int i = begin + u * kSamplingThreads;
      values[u] = i < count ? __ldcg(logits + i) : 0.0f;
    }
#pragma unroll
    for (int u = 0; u < kInFlight; u++) {
      const int i = begin + u * kSamplingThreads;
      if (i < count) own[i] = kEverything ? processed(p, row, b, first_id + i, values[u], 0.0f) : values[u];
    }
  }
  if (kEverything && row.num_bias > 0 && p.bias_ids) {
    __syncthreads();
    for (int i = threadIdx.x; i < min(row.num_bias, p.max_bias); i += kSamplingThreads) {
      const std::size_t at = static_cast<std::size_t>(b) * p.max_bias + i;
      const int place = p.bias_ids[at] - first_id;
      if (place < 0 || place >= count) continue;
      own[place] = processed(p, row, b, first_id + place, __ldcg(logits + place), p.bias_values[at]);
    }
    __syncthreads();
  }
}

template <bool kEverything>
__global__ void __launch_bounds__(kSamplingThreads, 1) sampling_kernel(const SamplingInputs p) {
  extern __shared__ float dynamic_scores[];
  __shared__ Shared shared;
  start_dependents();
  wait_for_predecessor();
  const Cluster cluster = {static_cast<int>(blockIdx.x), static_cast<int>(gridDim.x)};
  const int b = blockIdx.y;
  if (!is_active(p.next.state, b)) return;  // the whole cluster
  // In shared memory, because registers are short.
  constexpr int kRowWords = sizeof(SamplingRow) / sizeof(uint32_t);
  if (threadIdx.x < kRowWords) {
    reinterpret_cast<uint32_t*>(&shared.row)[threadIdx.x] =
        __ldcg(reinterpret_cast<const uint32_t*>(p.rows + b) + threadIdx.x);
  }
  __syncthreads();
  const SamplingRow& row = shared.row;
  const int first_id = min(p.vocab, cluster.rank * p.share), count = min(p.share, p.vocab - first_id);
  float* own = p.in_shared ? dynamic_scores : p.scores + static_cast<std::size_t>(b) * p.vocab + first_id;
  load_scores<kEverything>(p, row, b, first_id, count, own);
  if (threadIdx.x == 0) shared.share = uniform(row.seed, row.draw_index);
  __syncthreads();

  uint64 key = 0;
  for (int i = threadIdx.x; i < count; i += kSamplingThreads) key = larger(key, max_key(own[i], first_id + i));
  const float own_best = key ? key_value(key) : -INFINITY;
  key = cluster_combine<Combine::max>(shared.exchange, cluster, key, 0);
  const uint32_t best_bits = static_cast<uint32_t>(key >> 32);
  const int best_id = static_cast<int>(key_index(key));
  const bool finite = best_bits < 0xff800000u && best_bits > 0x007fffffu;  // between -inf and inf, as max_key orders

  if (!finite || row.temperature <= 0.0f) {
    if (threadIdx.x == 0) shared.token = cluster.rank == 0 ? (finite ? best_id : kNotFinite) : -1;
    __syncthreads();
  } else {
    const Scores scores = {own, count, first_id, key_value(key), 1.0f / fmaxf(row.temperature, kMinTemperature)};
    const uint64 min_mass = static_cast<uint64>(ceil(static_cast<double>(row.min_p) * kWeightUnit));
    if (!draw_among_few(shared.few, shared.exchange, cluster, scores, row, p.vocab, own_best, min_mass, shared.share,
                        &shared.token)) {
      const Candidacy candidacy = select(shared.selection, shared.exchange, cluster, scores, row, p.vocab, min_mass);
      draw(shared.selection, shared.exchange, cluster, scores, candidacy, shared.share, &shared.token);
    }
  }

  TokenLogprobs* record = nullptr;
  float log_total = 0.0f;  // log-sum-exp of the model's own logits
  if (kEverything && p.logprobs && row.num_top >= 0 && finite) {
    const DecodeState& state = p.next.state;
    record =
        p.logprobs + static_cast<std::size_t>(b) * state.history_length + state.step_counts[b] % state.history_length;
    log_total = write_top_logprobs(shared.logprobs, shared.exchange, cluster,
                                   p.logits + static_cast<std::size_t>(b) * p.vocab + first_id, count, first_id,
                                   min(row.num_top, kMaxTopLogprobs), state, record);
  }

  const int token = shared.token;
  if (token != -1) {  // one block of the cluster
    const int chosen = token == kNotFinite ? -1 : token;
    if (threadIdx.x == 0) {
      const std::size_t at = static_cast<std::size_t>(b) * p.vocab + chosen;
      if (kEverything && chosen >= 0) {
        if (record) record->logprob = __ldcg(p.logits + at) - log_total;
        if (p.counts && is_penalised(row)) p.counts[at] += 1;
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
  const bool everything = args.counts || args.bias_ids || args.token_mask || args.logprobs;
  const auto kernel = everything ? sampling_kernel<true> : sampling_kernel<false>;
  const RowBlocks blocks = blocks_of_row(reinterpret_cast<const void*>(kernel), args.vocab, sizeof(Shared));
  SamplingInputs p = {};
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
  p.share = blocks.share;
  p.in_shared = blocks.in_shared;
  p.next = next_step(args.state, args.table, args.embed_scale, args.residual, args.residual_bf16);
  launch_row_blocks(kernel, blocks, static_cast<unsigned>(args.batch), 1, stream, pdl, p);
}

}  // namespace edgellm::kernels
