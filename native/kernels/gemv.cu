// Which GEMV kernel and tile configuration serves a shape.
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
void launch_gemv_mma<WeightFormat::int4>(const GemvArgs&, const GemvTile&, cudaStream_t, bool);

namespace {

enum class Family { fma, int4, mma };
struct Choice {
  Family family;
  GemvTile tile;
};

bool is_8bit(const WeightView& w) { return w.format == WeightFormat::fp8 || w.format == WeightFormat::int8; }

int chunks_of(const WeightView& w) { return w.cols / (is_8bit(w) ? 16 : 8); }

int fma_threads(const WeightView& w, const FmaConfig& c) { return ceil_div(ceil_div(chunks_of(w), c.chunks), 32) * 32; }

bool fma_fits(const WeightView& w, const FmaConfig& c) { return fma_threads(w, c) <= c.max_threads; }

constexpr int kMaxStagedCols = 20 * 1024;

// All configurations that can run `args`, in a fixed order: single-token kernels first, then tensor-core tiles.
int list_choices(const GemvArgs& args, Choice* out) {
  int count = 0;
  if (args.num_tokens == 1 && args.weight.format == WeightFormat::int4) {
    // The staged x must fit the shared memory that every block may have.
    const int configs = args.weight.group >= 64 ? kNumInt4Configs : kNumInt4SmallGroupConfigs;
    for (int i = 0; i < configs && args.weight.cols <= kMaxStagedCols; i++) {
      const Int4Config& c = kInt4Configs[i];
      if (c.once && ceil_div(args.weight.cols, 64) > c.warps * c.depth) continue;
      out[count++] = {Family::int4, {i, kMmaRows, c.warps * 32}};
    }
  } else if (args.num_tokens == 1) {
    for (int i = 0; i < num_fma_configs(is_8bit(args.weight)); i++) {
      const FmaConfig c = fma_config(i, is_8bit(args.weight));
      if (fma_fits(args.weight, c)) out[count++] = {Family::fma, {i, c.rows, fma_threads(args.weight, c)}};
    }
  }
  for (int i = 0; i < kNumMmaConfigs; i++) out[count++] = {Family::mma, {i, kMmaRows, kMmaWarps * 32}};
  return count;
}
constexpr int kMaxChoices = kNumFmaConfigs16 + kNumFmaConfigs8 + kNumInt4Configs + kNumMmaConfigs;

// Higher is better. The measured preferences of GPU.md: enough blocks to fill the GPU first, then many bytes in flight
// a thread and few idle lanes.
float score(const GemvArgs& args, const Choice& choice, int num_sms) {
  const WeightView& w = args.weight;
  const int blocks = gemv_blocks(args, choice.tile.rows_per_block);
  switch (choice.family) {
    case Family::int4: {
      const Int4Config& c = kInt4Configs[choice.tile.config];
      const float per_warp = static_cast<float>(ceil_div(w.cols, 64)) / static_cast<float>(c.warps);
      // A warp whose share is in flight as a whole, and no more warps than that needs.
      const float fit = per_warp <= static_cast<float>(c.depth) ? per_warp / static_cast<float>(c.depth)
                                                                : static_cast<float>(c.depth) / per_warp;
      return 10.0f + fit + (c.depth == 8 ? 0.2f : 0.0f);
    }
    case Family::fma: {
      const FmaConfig c = fma_config(choice.tile.config, is_8bit(w));
      const float used = static_cast<float>(chunks_of(w)) / static_cast<float>(choice.tile.threads * c.chunks);
      const float fill = static_cast<float>(blocks) / static_cast<float>(2 * num_sms);
      const int in_flight = c.chunks * c.rows;  // loads a thread: 4, 8 or 16
      const bool deep = in_flight == 16 && fill > 2.0f && (c.chunks == 2 || !is_8bit(w));
      const float preference = (choice.tile.threads < 96 ? 0.5f : 1.0f) * (in_flight == 4 ? 0.9f
                                                                           : deep         ? 1.02f
                                                                                          : 1.0f) -
                               0.005f * static_cast<float>(c.chunks);
      return 10.0f + used * preference * (fill < 1.0f ? fill : 1.0f);
    }
    default:
      return blocks >= 4 * num_sms ? (kMmaConfigs[choice.tile.config] == 2 ? 2.0f : 1.0f)
                                   : (kMmaConfigs[choice.tile.config] == 2 ? 1.0f : 2.0f);
  }
}

Choice choose(const GemvArgs& args) {
  Choice choices[kMaxChoices];
  const int count = list_choices(args, choices);
  if (args.tile >= 0) {
    assert(args.tile < count);
    return choices[args.tile];
  }
  const int num_sms = device_traits().num_sms;
  int best = 0;
  for (int i = 1; i < count; i++) {
    if (score(args, choices[i], num_sms) > score(args, choices[best], num_sms)) best = i;
  }
  return choices[best];
}

}  // namespace

int gemv_num_tiles(const GemvArgs& args) {
  Choice choices[kMaxChoices];
  return list_choices(args, choices);
}

int gemv_num_blocks(const GemvArgs& args) { return gemv_blocks(args, choose(args).tile.rows_per_block); }

void gemv_async(const GemvArgs& args, cudaStream_t stream, bool pdl) {
  assert(args.num_tokens >= 1 && args.num_tokens <= kMaxGemvTokens && args.weight.cols % 16 == 0);
  const Choice choice = choose(args);
  if (choice.family == Family::int4) return launch_gemv_int4(args, choice.tile, stream, pdl);
  const bool fma = choice.family == Family::fma;
  switch (args.weight.format) {
    case WeightFormat::bf16:
      return fma ? launch_gemv_fma<WeightFormat::bf16>(args, choice.tile, stream, pdl)
                 : launch_gemv_mma<WeightFormat::bf16>(args, choice.tile, stream, pdl);
    case WeightFormat::fp16:
      return fma ? launch_gemv_fma<WeightFormat::fp16>(args, choice.tile, stream, pdl)
                 : launch_gemv_mma<WeightFormat::fp16>(args, choice.tile, stream, pdl);
    case WeightFormat::fp8:
      return fma ? launch_gemv_fma<WeightFormat::fp8>(args, choice.tile, stream, pdl)
                 : launch_gemv_mma<WeightFormat::fp8>(args, choice.tile, stream, pdl);
    case WeightFormat::int8:
      return fma ? launch_gemv_fma<WeightFormat::int8>(args, choice.tile, stream, pdl)
                 : launch_gemv_mma<WeightFormat::int8>(args, choice.tile, stream, pdl);
    case WeightFormat::int4:
      return launch_gemv_mma<WeightFormat::int4>(args, choice.tile, stream, pdl);
  }
}

}  // namespace edgellm::kernels
