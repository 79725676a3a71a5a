// LoRA adapters in the decoder: loading them, and what a linear layer's call needs when a sequence has one.
#include <algorithm>
#include <array>
#include <stdexcept>

#include "edgellm/cuda_try.hpp"
#include "edgellm/decoder.hpp"
#include "guarded.hpp"

namespace edgellm {

void Decoder::load_adapter(int index, std::span<const AdapterTensors> tensors) {
  guarded([&] {
    stream_.wait();  // a run under way reads the adapters
    adapters_.load(index, tensors, stream_.get());
    capture_adapted();
  });
}

void Decoder::unload_adapter(int index) {
  guarded([&] {
    stream_.wait();
    adapters_.unload(index, stream_.get());
    capture_adapted();
  });
}

void Decoder::capture_adapted() {
  const unsigned linears = adapters_.linears();
  std::vector<StepKey> keys;
  for (const auto& [key, graph] : graphs_) {
    if (key.adapted == 0) keys.push_back(key);
  }
  std::erase_if(graphs_, [&](const auto& entry) { return entry.first.adapted != 0 && entry.first.adapted != linears; });
  if (linears == 0) return;
  for (StepKey key : keys) {
    key.adapted = linears;
    (void)graph(key);
  }
  stream_.wait();
}

void Decoder::warm_up_adapters() {
  if (config_.max_adapters == 0) return;
  // As in finish_load: a kernel's code must be there before a capture. No token has an adapter, so that h stays as it
  // is.
  upload_adapters_async(std::array<std::int32_t, 1>{});
  kernels::GemvArgs args = gemv_args(weights_.layer(0).qkv, "attn.qkv", 1);
  args.x = arena_.get<__nv_bfloat16>("residual_bf16");
  args.lora = adapters_.view(0, Linear::kQkv, arena_.get<std::int32_t>("lora.decode_adapters"));
  adapt_async(args, false);
}

unsigned Decoder::adapted_linears(std::span<const std::int32_t> adapters) const {
  bool any = false;
  for (const std::int32_t adapter : adapters) {
    adapters_.check(adapter);
    any = any || adapter != 0;
  }
  return any ? adapters_.linears() : 0;
}

void Decoder::upload_adapters_async(std::span<const std::int32_t> adapters) {
  std::int32_t* inputs = take_inputs(adapters.size());
  std::copy(adapters.begin(), adapters.end(), inputs);
  EDGELLM_CUDA_TRY(cudaMemcpyAsync(arena_.get<std::int32_t>("lora.decode_adapters"), inputs, adapters.size_bytes(),
                                   cudaMemcpyHostToDevice, stream_.get()));
}

void Decoder::adapt_async(const kernels::GemvArgs& args, bool pdl) {
  kernels::LoraDownArgs down;
  down.lora = args.lora;
  down.x = args.x;
  down.gain = args.gain;
  down.norm_eps = args.norm_eps;
  down.num_tokens = args.num_tokens;
  down.cols = args.weight.cols;
  kernels::lora_down_async(down, stream_.get(), pdl);
}

bool Decoder::adapt_product_async(int adapter, int layer, Linear linear, const __nv_bfloat16* x, __nv_bfloat16* y,
                                  int num_tokens, bool pdl) {
  if (adapter == 0) return pdl;
  const kernels::LoraLinear& part = adapters_.part(adapter, layer, linear);
  if (part.num_a_rows == 0) return pdl;
  kernels::LoraPrefillArgs args;
  args.linear = part;
  const std::vector<int> rows = adapters_.target_rows(linear);
  std::copy(rows.begin(), rows.end(), args.first_rows);
  args.num_targets = static_cast<int>(rows.size()) - 1;
  args.rows = rows.back();
  args.x = x;
  args.h = arena_.get<__nv_bfloat16>("lora.prefill_h");
  args.y = y;
  args.num_tokens = num_tokens;
  args.cols = layer_linears(config_)[static_cast<std::size_t>(linear)].cols;
  kernels::lora_prefill_async(args, stream_.get(), pdl);
  return pdl_;
}

}  // namespace edgellm
