// Which GEMV kernel and tile configuration serves a shape on a GPU.
#include <algorithm>
#include <cassert>

#include "gemv_choice.hpp"
#include "gemv_tensor_once.cuh"
#include "gemv_tensor_resident.cuh"
#include "gemv_tensor_ring.cuh"

namespace edgellm::kernels {
namespace {

bool is_8bit(const WeightView& w) {
  return w.format != WeightFormat::bf16 && w.format != WeightFormat::fp16 && w.format != WeightFormat::int4;
}

int chunks_of(const WeightView& w) { return w.cols / (is_8bit(w) ? 16 : 8); }

int fma_threads(const WeightView& w, const FmaConfig& c) { return ceil_div(ceil_div(chunks_of(w), c.chunks), 32) * 32; }

bool fma_fits(const WeightView& w, const FmaConfig& c) { return fma_threads(w, c) <= c.max_threads; }

// Beyond, int4 products are faster on the other kind of tile.
constexpr int kMostInt4Tokens = 8;

// Whether the integer kernels can run `args`. A token's bits are theirs whatever else is computed.
bool int4_fits(const GemvArgs& args, const GemvDevice& device) {
  return args.weight.format == WeightFormat::int4 && int4_tokens_at_once(args.weight.cols, device) >= 1 &&
         (args.num_tokens <= kMostInt4Tokens || args.batch_invariant);
}

// Whether the kernels of gemv_tensor.cuh know the format.
bool has_tensor_kernels(const WeightView& w) {
  return w.format == WeightFormat::bf16 || w.format == WeightFormat::fp16 || w.format == WeightFormat::fp8;
}

int tensor_units(const WeightView& w) { return ceil_div(w.cols * (is_8bit(w) ? 1 : 2), 64); }

// Shared memory of a block that keeps x, static part included. Whatever is multiplied: as bf16 weights' norms take it.
std::size_t resident_block_bytes(const WeightView& w, const RingConfig& c, int num_tokens) {
  const int tokens = std::min(num_tokens, kMaxTensorTokens);
  return resident_static_bytes(c) +
         (w.format == WeightFormat::fp8    ? resident_bytes<WeightFormat::fp8, XKind::normed>(c, w.cols, tokens)
          : w.format == WeightFormat::fp16 ? resident_bytes<WeightFormat::fp16, XKind::normed>(c, w.cols, tokens)
                                           : resident_bytes<WeightFormat::bf16, XKind::wide>(c, w.cols, tokens));
}

// Their configurations for one token, or for several: those whose number of warps leaves room for the x of as many
// tokens as a launch has.
int list_tensor(const WeightView& w, int num_tokens, const GemvDevice& device, GemvChoice* out) {
  const bool several = num_tokens > 1;
  int count = 0;
  const int most_warps = device.max_shared_bytes >= kSharedBytesOf16Warps ? 16 : 8;
  for (int i = 0; i < kNumOnceConfigs && !several; i++) {
    const OnceConfig& c = kOnceConfigs[i];
    const bool fits = tensor_units(w) <= c.warps * c.depth && c.warps <= most_warps;
    if (fits) out[count++] = {GemvFamily::once, {i, c.tiles * 8, c.warps * 32}};
  }
  for (int i = 0; i < kNumRingConfigs; i++) {
    const RingConfig& c = kRingConfigs[i];
    if (c.several == several && c.warps <= most_warps)
      out[count++] = {GemvFamily::ring, {i, c.tiles * 8, c.warps * 32}};
  }
  for (int i = 0; i < kNumResidentConfigs && several; i++) {
    const RingConfig& c = kResidentConfigs[i];
    if (resident_block_bytes(w, c, num_tokens) <= device.max_shared_bytes)
      out[count++] = {GemvFamily::resident, {i, c.tiles * 8, c.warps * 32}};
  }
  return count;
}

// All configurations that can run `args`, in a fixed order: single-token kernels first, then tensor-core tiles. With
// batch_invariant only those that give a token the same bits whatever their number: what several get follows from what
// one would.
int list_choices(const GemvArgs& args, const GemvDevice& device, GemvChoice* out) {
  int count = 0;
  if (int4_fits(args, device)) {
    const bool small_groups = args.weight.group < 64;
    const bool needs_ring = !small_groups && (args.num_tokens > 1 || args.batch_invariant);
    const auto is_listed = [&](int threads) {
      return std::any_of(out, out + count, [=](const GemvChoice& other) { return other.tile.threads == threads; });
    };
    for (int i = 0; i < (small_groups ? kNumInt4SmallGroupConfigs : kNumInt4Configs); i++) {
      const Int4Config& c = kInt4Configs[i];
      if (needs_ring && !int4_ring_fits(c.warps, device)) continue;
      // Of several tokens' own tiles there is one for each number of warps.
      if (needs_ring && !args.batch_invariant && is_listed(c.warps * 32)) continue;
      if (c.once && ceil_div(args.weight.cols, 64) > c.warps * c.depth) continue;
      out[count++] = {GemvFamily::int4, {i, kMmaRows, c.warps * 32}};
    }
    if (args.batch_invariant) return count;
  } else if (has_tensor_kernels(args.weight) && args.batch_invariant) {
    return list_tensor(args.weight, 1, device, out);
  } else if (args.weight.format != WeightFormat::int4 && (args.num_tokens == 1 || args.batch_invariant)) {
    const bool several = args.num_tokens > 1;
    for (int i = 0; i < num_fma_configs(is_8bit(args.weight)); i++) {
      const FmaConfig c = fma_config(i, is_8bit(args.weight));
      if (!fma_fits(args.weight, c)) continue;
      out[count++] = {several ? GemvFamily::several : GemvFamily::fma, {i, c.rows, fma_threads(args.weight, c)}};
    }
    if (args.batch_invariant && count > 0) return count;
  }
  if (has_tensor_kernels(args.weight) && args.num_tokens <= kMaxTensorTokens) {
    return count + list_tensor(args.weight, args.num_tokens, device, out + count);
  }
  for (int i = 0; i < kNumMmaConfigs; i++) out[count++] = {GemvFamily::mma, {i, kMmaRows, kMmaWarps * 32}};
  return count;
}
constexpr int kMaxChoices = kNumFmaConfigs16 + kNumFmaConfigs8 + kNumOnceConfigs + kNumRingConfigs +
                            kNumResidentConfigs + kNumInt4Configs + kNumMmaConfigs;

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
  float preference = in_flight == 8 ? 0.995f : in_flight == 16 ? 0.99f : 0.985f;
  FmaConfig best = {1, 8, is_8bit(w) ? 256 : 512, 0};
  if (is_8bit(w) && w.rows < 100 * num_sms) {  // fewer rows are spread better by smaller blocks
    best.rows = 4;
    if (w.rows < 40 * num_sms && chunks_of(w) >= 256) best.chunks = 2;
  } else if (!is_8bit(w) && args.epilogue == Epilogue::residual && w.rows < 40 * num_sms && chunks_of(w) <= 512) {
    best.chunks = 2, best.rows = 4;  // attention's product
  }
  if (c.chunks == best.chunks && c.rows == best.rows && c.max_threads == best.max_threads) preference = 1.01f;
  if (tile.threads < 96) preference *= 0.5f;
  return used * (preference - 0.005f * static_cast<float>(c.chunks)) * (fill < 1.0f ? fill : 1.0f);
}

// Of one token, in relation to each other.
float score_tensor_one(const GemvArgs& args, const GemvChoice& choice, int num_sms) {
  const WeightView& w = args.weight;
  const int units = tensor_units(w), warps = choice.tile.threads / 32, tiles = choice.tile.rows_per_block / 8;
  const bool ring = choice.family == GemvFamily::ring;
  const int depth = ring ? kRingConfigs[choice.tile.config].depth : kOnceConfigs[choice.tile.config].depth;
  RingConfig best = {8, 0, 1, false};
  bool best_ring = false;
  if (is_8bit(w)) {
    const bool few_rows = w.rows < 40 * num_sms;
    best_ring = units > 64 || (units > 40 && !few_rows);
    if (units > 64) best = units < 144 ? RingConfig{16, 4, 1, false} : RingConfig{16, 2, 2, false};
    if (!best_ring) best.warps = few_rows && units % 16 == 0 ? 16 : 8, best.tiles = 2;
  } else {
    const bool few_rows = w.rows < 64 * num_sms;
    best_ring = units > 128;
    if (best_ring) best = {16, 8, 1, false};
    if (few_rows && units > 64) best.warps = 16;
  }
  const bool is_best =
      ring == best_ring && warps == best.warps && tiles == best.tiles && (best.depth == 0 || depth == best.depth);
  // A share that a warp has in registers has no use for more of them.
  return (is_best ? 3.0f : ring == best_ring ? 2.0f : 1.0f) - 0.01f * static_cast<float>(depth);
}

// Of several: blocks of 32 rows, which share the staged x, where they leave one for every SM; of 16 warps, two of
// three. x that must be normed first is kept where a block has rows enough for that.
float score_tensor_several(const GemvArgs& args, const GemvChoice& choice, int num_sms) {
  const GemvTile& tile = choice.tile;
  if (choice.family == GemvFamily::resident) {
    const int each = tile.rows_per_block == 32 ? 3 : 2;
    return args.gain && gemv_blocks(args, tile.rows_per_block) >= each * num_sms ? 3.0f : 0.0f;
  }
  const bool large = 3 * gemv_blocks(args, 32) >= (tile.threads == 512 ? 2 : 3) * num_sms;
  return (tile.rows_per_block == 32) == large ? 2.0f : 1.0f;
}

float score(const GemvArgs& args, const GemvChoice& choice, int num_sms) {
  switch (choice.family) {
    case GemvFamily::once:
    case GemvFamily::resident:
    case GemvFamily::ring: {
      if (args.num_tokens > 1) return 5.0f + score_tensor_several(args, choice, num_sms);
      // For one token alone the others are faster, but for long rows.
      const bool long_rows = tensor_units(args.weight) > (is_8bit(args.weight) ? 144 : 256);
      return (long_rows ? 20.0f : 1.0f) + score_tensor_one(args, choice, num_sms);
    }
    case GemvFamily::int4:
      return 10.0f + score_int4(args, kInt4Configs[choice.tile.config], num_sms);
    case GemvFamily::fma:
    case GemvFamily::several:
      return 10.0f + score_fma(args, choice.tile, num_sms);
    default: {
      const bool many_rows = gemv_blocks(args, choice.tile.rows_per_block) >= 4 * num_sms;
      return (kMmaConfigs[choice.tile.config] == 2) == many_rows ? 2.0f : 1.0f;
    }
  }
}

int best_of(const GemvArgs& args, const GemvDevice& device, const GemvChoice* choices, int count) {
  const int num_sms = device.num_sms;
  int best = 0;
  for (int i = 1; i < count; i++) {
    if (score(args, choices[i], num_sms) > score(args, choices[best], num_sms)) best = i;
  }
  return best;
}

// For several tokens what goes with `one`, the choice for one of them.
GemvChoice choose_tensor_several(const GemvArgs& args, const GemvDevice& device, const GemvChoice& one) {
  constexpr int kMost = kNumRingConfigs + kNumResidentConfigs;
  GemvChoice choices[kMost], all[kMost];
  int count = 0;
  for (int i = 0, most = list_tensor(args.weight, args.num_tokens, device, all); i < most; i++) {
    if (all[i].tile.threads == one.tile.threads) choices[count++] = all[i];
  }
  assert(count > 0);
  return choices[best_of(args, device, choices, count)];
}

// Of small groups. Staging several tokens' x costs more than the weights: as many tiles share it as leave a block for
// most SMs. With the same number of warps the sums, and with them a token's bits, stay what they are for `one`.
GemvChoice choose_int4_several(const GemvArgs& args, const GemvDevice& device, const GemvChoice* choices, int count,
                               const GemvChoice& one) {
  GemvChoice best = one;
  for (int i = 0; i < count; i++) {
    if (choices[i].family != GemvFamily::int4) continue;
    const Int4Config& c = kInt4Configs[choices[i].tile.config];
    const bool fills = ceil_div(gemv_blocks(args, kMmaRows), c.tiles) >= device.num_sms * 3 / 4;
    const bool alike = c.warps == kInt4Configs[best.tile.config].warps;
    if (alike && c.tiles > kInt4Configs[best.tile.config].tiles && fills) best = choices[i];
  }
  return best;
}

}  // namespace

int num_gemv_choices(const GemvArgs& args, const GemvDevice& device) {
  GemvChoice choices[kMaxChoices];
  return list_choices(args, device, choices);
}

GemvChoice choose_gemv(const GemvArgs& args, const GemvDevice& device) {
  GemvChoice choices[kMaxChoices];
  const int count = list_choices(args, device, choices);
  assert(args.tile < count);
  if (args.tile >= 0 && !args.batch_invariant) return choices[args.tile];
  const bool several = args.num_tokens > 1;
  const bool as_one = has_tensor_kernels(args.weight) ? args.batch_invariant || args.num_tokens <= kMaxTensorTokens
                                                      : int4_fits(args, device) && args.weight.group >= 64;
  if (several && as_one) {
    GemvArgs one = args;
    one.num_tokens = 1;
    one.batch_invariant = true;
    const GemvChoice chosen = choose_gemv(one, device);
    return chosen.family == GemvFamily::int4 ? chosen
                                             : choose_tensor_several(args, device, chosen);  // int4: by the warps alone
  }
  const GemvChoice best = choices[args.tile >= 0 ? args.tile : best_of(args, device, choices, count)];
  return best.family == GemvFamily::int4 && several ? choose_int4_several(args, device, choices, count, best) : best;
}

std::size_t gemv_shared_bytes(const GemvArgs& args, const GemvChoice& choice) {
  const int tokens = std::min(args.num_tokens, kMaxTensorTokens), warps = choice.tile.threads / 32;
  const auto sums = [&](int most_tokens, int rows) { return sizeof(float) * warps * most_tokens * (rows + 1); };
  const bool wide = args.x_f32 && takes_wide_x(args.weight.format);
  switch (choice.family) {
    case GemvFamily::once: {
      const OnceConfig& c = kOnceConfigs[choice.tile.config];
      return is_8bit(args.weight) ? once_shared_bytes<WeightFormat::fp8, XKind::normed>(c.warps, c.depth, c.tiles)
             : wide               ? once_shared_bytes<WeightFormat::bf16, XKind::wide>(c.warps, c.depth, c.tiles)
                                  : once_shared_bytes<WeightFormat::bf16, XKind::normed>(c.warps, c.depth, c.tiles);
    }
    case GemvFamily::ring: {
      const RingConfig& c = kRingConfigs[choice.tile.config];
      const int most = c.several ? kMaxTensorTokens : 1;
      const std::size_t ring = is_8bit(args.weight) ? ring_bytes<WeightFormat::fp8, XKind::normed>(c, most, tokens)
                               : wide               ? ring_bytes<WeightFormat::bf16, XKind::wide>(c, most, tokens)
                                                    : ring_bytes<WeightFormat::bf16, XKind::normed>(c, most, tokens);
      return sums(most, c.tiles * 8) + ring;
    }
    case GemvFamily::resident:
      return resident_block_bytes(args.weight, kResidentConfigs[choice.tile.config], args.num_tokens);
    case GemvFamily::int4:
      if (args.weight.group >= 64 && args.num_tokens > 1) return int4_ring_bytes(warps, args.num_tokens);
      return sums(kMaxInt4Tokens, 64) + int4_staged_bytes(args.weight.cols) * std::min(args.num_tokens, kMaxInt4Tokens);
    default:
      return sums(kMaxGemvTokens, 32);
  }
}

GemvPlan plan_gemv(const GemvArgs& args, int num_sms, std::size_t max_shared_bytes) {
  constexpr const char* kNames[] = {"fma", "several", "once", "ring", "int4", "mma", "resident"};
  const GemvDevice device = {num_sms, max_shared_bytes};
  const GemvChoice choice = choose_gemv(args, device);
  return {kNames[static_cast<int>(choice.family)],
          choice.tile.config,
          choice.tile.threads / 32,
          choice.tile.rows_per_block,
          gemv_shared_bytes(args, choice),
          num_gemv_choices(args, device)};
}

}  // namespace edgellm::kernels
