// y = W x: the kernel that was chosen for the GPU at hand, and more tokens than one launch takes in turns.
#include <cassert>

#include "gemv_choice.hpp"
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

GemvDevice gemv_device() { return {device_traits().num_sms, device_traits().max_shared_bytes}; }

int gemv_num_tiles(const GemvArgs& args) { return num_gemv_choices(args, gemv_device()); }

int gemv_num_blocks(const GemvArgs& args) {
  return gemv_blocks(args, choose_gemv(args, gemv_device()).tile.rows_per_block);
}

namespace {

// Of the kernels for several tokens; with batch_invariant more take turns.
constexpr int kMostTokensAtOnce = kMaxTensorTokens;

template <WeightFormat F>
void launch_gemv(const GemvArgs& args, const GemvChoice& choice, cudaStream_t stream, bool pdl) {
  if (choice.family == GemvFamily::mma) return launch_gemv_mma<F>(args, choice.tile, stream, pdl);
  if (choice.family == GemvFamily::fma) return launch_gemv_fma<F>(args, choice.tile, stream, pdl);
  if constexpr (F == WeightFormat::bf16 || F == WeightFormat::fp16 || F == WeightFormat::fp8) {
    if (choice.family == GemvFamily::once) return launch_tensor_once<F>(args, choice.tile, stream, pdl);
    if (args.num_tokens == 1) return launch_tensor_ring<F, 1>(args, choice.tile, stream, pdl);
  }
  for (int first = 0; first < args.num_tokens; first += kMostTokensAtOnce) {
    GemvArgs part = gemv_part(args, first, kMostTokensAtOnce, choice.tile.rows_per_block);
    if constexpr (F == WeightFormat::bf16 || F == WeightFormat::fp16 || F == WeightFormat::fp8) {
      if (choice.family == GemvFamily::resident) {
        launch_tensor_resident<F>(part, choice.tile, stream, pdl || first > 0);
      } else {
        launch_tensor_ring<F, kMaxTensorTokens>(part, choice.tile, stream, pdl || first > 0);
      }
    } else {
      launch_fma_several<F>(part, choice.tile, stream, pdl || first > 0);
    }
  }
}

}  // namespace

void gemv_async(const GemvArgs& args, cudaStream_t stream, bool pdl) {
  assert(args.num_tokens >= 1 && args.num_tokens <= kMaxGemvTokens && args.weight.cols % 16 == 0);
  const GemvChoice choice = choose_gemv(args, gemv_device());
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
      if (choice.family == GemvFamily::int4) return launch_gemv_int4(args, choice.tile, stream, pdl);
      return launch_gemv_mma<WeightFormat::int4>(args, choice.tile, stream, pdl);
  }
}

}  // namespace edgellm::kernels
