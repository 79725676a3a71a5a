// Which GEMV kernel and tile configuration serves a shape.
#include <algorithm>
#include <cassert>

#include "gemv_common.cuh"
#include "launch.hpp"

namespace edgellm::kernels {

template <>
void launch_gemv_mma<WeightFormat::bf16>(const GemvArgs&, const GemvTile&, cudaStream_t, bool);
template <>
void launch_gemv_mma<WeightFormat::fp16>(const GemvArgs&, const GemvTile&, cudaStream_t, bool);
template <>
void launch_gemv_mma<WeightFormat::fp8>(const GemvArgs&, const GemvTile&, cudaStream_t, bool);
template <>
void launch_gemv_mma<WeightFormat::int8>(const GemvArgs&, const GemvTile&, cudaStream_t, bool);
template <>
void launch_gemv_mma<WeightFormat::int8_offset>(const GemvArgs&, const GemvTile&, cudaStream_t, bool);
template <>
void launch_gemv_mma<WeightFormat::fp8_blocks>(const GemvArgs&, const GemvTile&, cudaStream_t, bool);
template <>
void launch_gemv_mma<WeightFormat::int4>(const GemvArgs&, const GemvTile&, cudaStream_t, bool);

namespace {

enum class Family { fma, several, int4, mma };
struct Choice {
  Family family;
  GemvTile tile;
};

bool is_8bit(const WeightView& w) {
  return w.format != WeightFormat::bf16 && w.format != WeightFormat::fp16 && w.format != WeightFormat::int4;
}

int chunks_of(const WeightView& w) { return w.cols / (is_8bit(w) ? 16 : 8); }

int fma_threads(const WeightView& w, const FmaConfig& c) { return ceil_div(ceil_div(chunks_of(w), c.chunks), 32) * 32; }

bool fma_fits(const WeightView& w, const FmaConfig& c) { return fma_threads(w, c) <= c.max_threads; }

// Beyond, int4 products are faster on the other kind of tile.
constexpr int kMostInt4Tokens = 8;
// That gemv_fma_several computes; with batch_invariant more tokens take turns.
constexpr int kMostFmaTokens = 8;

// Whether the integer kernels can run `args`. A token's bits are theirs whatever else is computed.
bool int4_fits(const GemvArgs& args) {
  return args.weight.format == WeightFormat::int4 && int4_tokens_at_once(args.weight.cols) >= 1 &&
         (args.num_tokens <= kMostInt4Tokens || args.batch_invariant);
}

// All configurations that can run `args`, in a fixed order: single-token kernels first, then tensor-core tiles. With
// batch_invariant only those that give a token the same bits whatever their number.
int list_choices(const GemvArgs& args, Choice* out) {
  int count = 0;
  if (int4_fits(args)) {
    const int configs = args.weight.group >= 64 ? kNumInt4Configs : kNumInt4SmallGroupConfigs;
    for (int i = 0; i < configs; i++) {
      const Int4Config& c = kInt4Configs[i];
      if (c.once && ceil_div(args.weight.cols, 64) > c.warps * c.depth) continue;
      out[count++] = {Family::int4, {i, kMmaRows, c.warps * 32}};
    }
    if (args.batch_invariant) return count;
  } else if (args.weight.format != WeightFormat::int4 && (args.num_tokens == 1 || args.batch_invariant)) {
    const bool several = args.num_tokens > 1;
    for (int i = 0; i < num_fma_configs(is_8bit(args.weight)); i++) {
      const FmaConfig c = fma_config(i, is_8bit(args.weight));
      if (!fma_fits(args.weight, c)) continue;
      out[count++] = {several ? Family::several : Family::fma, {i, c.rows, fma_threads(args.weight, c)}};
    }
    if (args.batch_invariant && count > 0) return count;
  }
  for (int i = 0; i < kNumMmaConfigs; i++) out[count++] = {Family::mma, {i, kMmaRows, kMmaWarps * 32}};
  return count;
}
constexpr int kMaxChoices = kNumFmaConfigs16 + kNumFmaConfigs8 + kNumInt4Configs + kNumMmaConfigs;

// Higher is better. The preferences are measured (bench/bench_gemv.py; 1B, 4B and 8B shapes on an H100).
float score_int4(const GemvArgs& args, const Int4Config& c, int num_sms) {
  const int blocks = ceil_div(args.weight.cols, 64), share = ceil_div(blocks, c.warps);
  const float tiles_per_sm = static_cast<float>(gemv_blocks(args, kMmaRows)) / static_cast<float>(num_sms);
  if (tiles_per_sm >= 6.0f) {  // enough for two tiles a block, which share the staged x
    if (c.once || c.tiles != 2) return 0.0f;
    const bool even_share = ceil_div(blocks, 8) % 2 == 0;
    return c.warps == (even_share ? 8 : 4) ? 2.0f : 1.0f;
  }
  // Few and short rows: two tiles, too, and all of a warp's share in flight at once.
  const bool is_short = blocks > 16 && blocks <= 40;
  if (is_short && c.once && c.tiles == 2 && c.warps == 8) return 3.0f - 0.01f * static_cast<float>(c.depth);
  if (c.tiles != 1) return 0.0f;
  // The same with one tile, by as many warps as that takes; few tiles spread over more warps.
  const int warps = blocks > 64 || (tiles_per_sm < 1.25f && blocks > 40) ? 16 : 8;
  if (c.warps != warps) return c.warps < warps ? 0.5f : 0.4f;
  if (blocks > 128) return c.once ? 0.5f : 2.0f - 0.01f * static_cast<float>(c.depth);
  return c.once ? 2.0f - 0.01f * static_cast<float>(c.depth - share) : 1.0f;
}

float score_fma(const GemvArgs& args, const GemvTile& tile, int num_sms) {
  const WeightView& w = args.weight;
  const FmaConfig c = fma_config(tile.config, is_8bit(w));
  const float used = static_cast<float>(chunks_of(w)) / static_cast<float>(tile.threads * c.chunks);
  // By the rows of a single token's kernel: several tokens must get the same configuration.
  const float fill = static_cast<float>(gemv_blocks(args, c.rows)) / (1.5f * static_cast<float>(num_sms));
  const int in_flight = c.chunks * c.rows;  // loads a thread
  float preference = tile.threads < 96 ? 0.5f : 1.0f;
  // Few rows are spread best by blocks with much under way, and so are those of a layer's widest product and of a head,
  // each of whose blocks leaves a maximum that greedy decoding looks through.
  const bool few_rows = w.rows < 40 * num_sms, head = w.rows >= 500 * num_sms;
  const bool many_rows = w.rows >= 100 * num_sms && !head;
  const int columns = tile.threads * c.chunks;  // 16-byte loads of a row
  if (is_8bit(w)) {
    float by_loads = in_flight == 4 ? 1.0f : in_flight == 8 ? 0.995f : c.chunks == 2 ? 0.998f : 0.97f;
    const int best_chunks = many_rows ? 2 : few_rows ? 1 : 0;
    if (in_flight == 16 && c.chunks == (head ? 1 : columns >= 256 ? best_chunks : 0)) by_loads = 1.01f;
    const bool tight = c.max_threads - tile.threads < 128;  // no registers kept for threads that are not there
    if (in_flight == 8 && c.chunks == 1 && many_rows && columns < 256 && tight) by_loads = 1.01f;
    preference *= tile.threads > 256 ? by_loads * 1.01f : by_loads;
  } else if (in_flight == 16) {
    const bool narrow = tile.threads > 128 && tile.threads <= 256;
    preference *= c.chunks == 2 ? 1.0f : c.chunks == 1 ? 0.993f : narrow ? 1.005f : 0.97f;
  } else if (few_rows) {
    preference *= in_flight == 8 ? (c.chunks == 1 && tile.threads > 256 ? 1.01f : 0.99f) : 0.97f;
  } else if (in_flight == 4) {
    preference *= columns >= 512 && !many_rows && !head ? 1.0f : 0.99f;
  } else {
    preference *= 0.985f;
  }
  return used * (preference - 0.005f * static_cast<float>(c.chunks)) * (fill < 1.0f ? fill : 1.0f);
}

float score(const GemvArgs& args, const Choice& choice, int num_sms) {
  switch (choice.family) {
    case Family::int4:
      return 10.0f + score_int4(args, kInt4Configs[choice.tile.config], num_sms);
    case Family::fma:
    case Family::several:
      return 10.0f + score_fma(args, choice.tile, num_sms);
    default: {
      const bool many_rows = gemv_blocks(args, choice.tile.rows_per_block) >= 4 * num_sms;
      return (kMmaConfigs[choice.tile.config] == 2) == many_rows ? 2.0f : 1.0f;
    }
  }
}

Choice choose(const GemvArgs& args) {
  Choice choices[kMaxChoices];
  const int count = list_choices(args, choices);
  assert(args.tile < count);
  if (args.tile >= 0 && !args.batch_invariant) return choices[args.tile];
  const int num_sms = device_traits().num_sms;
  int best = std::max(args.tile, 0);
  for (int i = 0; args.tile < 0 && i < count; i++) {
    if (score(args, choices[i], num_sms) > score(args, choices[best], num_sms)) best = i;
  }
  if (choices[best].family != Family::int4 || args.num_tokens == 1) return choices[best];
  // Staging several tokens' x costs more than the weights: as many tiles share it as leave a block for most SMs. With
  // the same number of warps the sums, and with them a token's bits, stay what they are for one token.
  const int warps = kInt4Configs[choices[best].tile.config].warps;
  for (int i = 0; i < count; i++) {
    if (choices[i].family != Family::int4) continue;
    const Int4Config& c = kInt4Configs[choices[i].tile.config];
    const bool fills = ceil_div(gemv_blocks(args, kMmaRows), c.tiles) >= num_sms * 3 / 4;
    if (c.warps == warps && c.tiles > kInt4Configs[choices[best].tile.config].tiles && fills) best = i;
  }
  return choices[best];
}

}  // namespace

int gemv_num_tiles(const GemvArgs& args) {
  Choice choices[kMaxChoices];
  return list_choices(args, choices);
}

int gemv_num_blocks(const GemvArgs& args) { return gemv_blocks(args, choose(args).tile.rows_per_block); }

namespace {

template <WeightFormat F>
void launch_gemv(const GemvArgs& args, const Choice& choice, cudaStream_t stream, bool pdl) {
  if (choice.family == Family::mma) return launch_gemv_mma<F>(args, choice.tile, stream, pdl);
  if (choice.family == Family::fma) return launch_gemv_fma<F>(args, choice.tile, stream, pdl);
  for (int first = 0; first < args.num_tokens; first += kMostFmaTokens) {
    GemvArgs part = gemv_part(args, first, kMostFmaTokens, choice.tile.rows_per_block);
    launch_fma_several<F>(part, choice.tile, stream, pdl || first > 0);
  }
}

}  // namespace

void gemv_async(const GemvArgs& args, cudaStream_t stream, bool pdl) {
  assert(args.num_tokens >= 1 && args.num_tokens <= kMaxGemvTokens && args.weight.cols % 16 == 0);
  const Choice choice = choose(args);
  switch (args.weight.format) {
    case WeightFormat::bf16:
      return launch_gemv<WeightFormat::bf16>(args, choice, stream, pdl);
    case WeightFormat::fp16:
      return launch_gemv<WeightFormat::fp16>(args, choice, stream, pdl);
    case WeightFormat::fp8:
      return launch_gemv<WeightFormat::fp8>(args, choice, stream, pdl);
    case WeightFormat::int8:
      return launch_gemv<WeightFormat::int8>(args, choice, stream, pdl);
    case WeightFormat::int8_offset:
      return launch_gemv<WeightFormat::int8_offset>(args, choice, stream, pdl);
    case WeightFormat::fp8_blocks:
      return launch_gemv<WeightFormat::fp8_blocks>(args, choice, stream, pdl);
    case WeightFormat::int4:
      if (choice.family == Family::int4) return launch_gemv_int4(args, choice.tile, stream, pdl);
      return launch_gemv_mma<WeightFormat::int4>(args, choice.tile, stream, pdl);
  }
}

}  // namespace edgellm::kernels
