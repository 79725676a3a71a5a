// Many tokens of one sequence: matrix products of all of them, or through the decode kernels where there are few tokens
// or where cuBLASLt is needed and not there. How a product is computed is decoder_products.cpp's.
#include <algorithm>
#include <span>
#include <vector>

#include "edgellm/cuda_try.hpp"
#include "edgellm/decoder.hpp"
#include "edgellm/kernels/attention_prefill.hpp"
#include "edgellm/kernels/embedding.hpp"
#include "edgellm/kernels/rms_norm.hpp"
#include "edgellm/kernels/rope.hpp"
#include "edgellm/kernels/swiglu.hpp"
#include "guarded.hpp"

namespace edgellm {

using kernels::Epilogue;
using kernels::GemvArgs;

void Decoder::prefill_async(const SequenceStep& item, int first_row) {
  const auto length = static_cast<int>(item.token_ids.size());
  // By the whole step, so that its last chunk, however short, is computed as the others are.
  const bool is_short = length > kMaxBatch && length <= most_multiplied_nodes_;  // but no copy is needed
  const bool is_long = length >= config_.min_gemm_tokens && config_.min_gemm_tokens <= config_.max_tokens;
  const bool products = products_reason_.empty() && (is_short || is_long);
  int row = first_row;
  for (const PromptChunk& chunk : cut_prompt(length, item.num_logits, config_.max_tokens, products)) {
    prefill_chunk_async(item, chunk, row, products);
    row += chunk.num_logits;
  }
}

// CUDA loads a kernel's code, which takes memory, when it first runs; no request is to be the one that finds none left.
// The decode kernels differ from one number of tokens to the next, down to the one that a pass of several leaves.
// Products have had their algorithms loaded when those were tried; what else a prompt has differs between short and
// long ones.
void Decoder::warm_up_prompts() {
  const int longest = std::min(config_.max_tokens, config_.capacity);
  const bool multiplied = products_reason_.empty() && config_.min_gemm_tokens <= longest;
  const std::vector<std::int32_t> zeros(static_cast<std::size_t>(std::max(longest, kernels::kMaxGemvTokens + 1)), 0);
  const auto run = [&](int length, int num_logits, int adapter) {
    if (length < 2 || length > config_.capacity) return;  // one token is a decode step
    prefill_async({0, std::span(zeros).first(static_cast<std::size_t>(length)), 0, num_logits, adapter}, 0);
    stream_.wait();
    inputs_used_ = 0;
  };
  const int last_decoded = multiplied ? config_.min_gemm_tokens - 1 : config_.capacity;
  for (int length = 2; length <= std::min(last_decoded, kernels::kMaxGemvTokens + 1); ++length) {
    run(length, std::min(length, kMaxLogitRows), 0);  // of the last layer so many rows
  }
  if (last_decoded >= 2) run(2, 1, 0);  // of the last layer one row, whose x is not a decode step's
  const int shortest = multiplied ? config_.min_gemm_tokens : 2;
  run(shortest, 1, 0);
  if (longest != shortest) run(longest, 1, 0);
  for (int rows = 1; rows <= kMaxLogitRows; ++rows) {
    record_head_async(rows, arena_.get<__nv_bfloat16>("residual_bf16"), arena_.get<float>("residual"), false, false);
  }
  stream_.wait();
  if (config_.max_adapters == 0 || config_.max_lora_rank == 0) return;
  // Of zeros, for one product: all kernels that a prompt with an adapter has.
  const int hidden = config_.hidden_size, width = config_.q_width();
  const std::vector<float> numbers(static_cast<std::size_t>(std::max(hidden, width)), 0.0F);
  const AdapterTensors one = {
      0, "o_proj", {numbers.data(), DType::kFloat32, {1, width}}, {numbers.data(), DType::kFloat32, {hidden, 1}}, 1.0F};
  adapters_.load(1, std::span(&one, 1), stream_.get());
  run(shortest, 1, 1);
  adapters_.unload(1, stream_.get());
  stream_.wait();
}

void Decoder::prefill_chunk_async(const SequenceStep& item, const PromptChunk& chunk, int first_row, bool products) {
  const int count = chunk.num_tokens;
  const int position = item.position + chunk.start;
  const auto token_ids =
      item.token_ids.subspan(static_cast<std::size_t>(chunk.start), static_cast<std::size_t>(chunk.num_tokens));
  cudaStream_t stream = stream_.get();
  // tokens, slots, positions, then what attention reads: of all tokens, and of the last layer's.
  const auto num_inputs = static_cast<std::size_t>(3 * count + 8);
  std::int32_t* inputs = take_inputs(num_inputs);
  for (int i = 0; i < count; ++i) {
    inputs[i] = token_ids[static_cast<std::size_t>(i)];
    inputs[count + i] = item.slot;
    inputs[2 * count + i] = position + i;
  }
  std::int32_t* sequence = inputs + 3 * count;
  for (const int rows : {count, chunk.num_last_rows}) {
    *sequence++ = 0;
    *sequence++ = rows;
    *sequence++ = item.slot;
    *sequence++ = position + count - rows;
  }
  auto* device_inputs = arena_.get<std::int32_t>("prefill_inputs");
  EDGELLM_CUDA_TRY(
      cudaMemcpyAsync(device_inputs, inputs, num_inputs * sizeof(std::int32_t), cudaMemcpyHostToDevice, stream));

  if (item.adapter != 0 && !products) {  // for the decode kernels, which look up each token's
    std::int32_t* adapters = take_inputs(kernels::kMaxGemvTokens);
    std::fill_n(adapters, kernels::kMaxGemvTokens, item.adapter);
    EDGELLM_CUDA_TRY(cudaMemcpyAsync(arena_.get<std::int32_t>("lora.prefill_adapters"), adapters,
                                     kernels::kMaxGemvTokens * sizeof(std::int32_t), cudaMemcpyHostToDevice, stream));
  }

  auto* residual = arena_.get<float>("residual");
  auto* residual_bf16 = arena_.get<__nv_bfloat16>("residual_bf16");
  kernels::embedding_async(weights_.embedding(), device_inputs, count, config_.embed_scale, residual, residual_bf16,
                           stream, false);
  kernels::rms_norm_async(residual, weights_.layer(0).input_norm, config_.rms_norm_eps, count, config_.hidden_size,
                          arena_.get<__nv_bfloat16>("normed"), stream, pdl_);
  if (multiplies_fp8(weights_.layer(0).qkv, products, item.adapter))
    quantize_x_async(arena_.get<__nv_bfloat16>("normed"), count, config_.hidden_size);
  for (int layer = 0; layer < config_.num_layers; ++layer) {
    const bool last = layer + 1 == config_.num_layers;
    prefill_layer_async(layer, count, last ? chunk.num_last_rows : count, products, item.adapter);
  }

  // The wanted rows are the last ones and contiguous, so they need no gathering.
  const auto vocab = static_cast<std::size_t>(config_.num_rows());
  for (int done = 0; done < chunk.num_logits; done += kMaxLogitRows) {
    const int rows = std::min(kMaxLogitRows, chunk.num_logits - done);
    const auto hidden = static_cast<std::size_t>(config_.hidden_size);
    const std::size_t offset = static_cast<std::size_t>(chunk.num_last_rows - chunk.num_logits + done) * hidden;
    const float* own_residual = residual + static_cast<std::size_t>(count - chunk.num_logits + done) * hidden;
    record_head_async(rows, residual_bf16 + offset, own_residual, false, false);
    EDGELLM_CUDA_TRY(cudaMemcpyAsync(
        host_logits_->as<float>() + static_cast<std::size_t>(first_row + done) * vocab, arena_.get<float>("logits"),
        static_cast<std::size_t>(rows) * vocab * sizeof(float), cudaMemcpyDeviceToHost, stream));
  }
}

void Decoder::prefill_layer_async(int index, int count, int num_rows, bool products, int adapter) {
  const LayerWeights& layer = weights_.layer(index);
  cudaStream_t stream = stream_.get();
  auto* normed = arena_.get<__nv_bfloat16>("normed");
  auto* qkv = arena_.get<__nv_bfloat16>("qkv");
  auto* q = arena_.get<__nv_bfloat16>("q");
  const auto* inputs = arena_.get<std::int32_t>("prefill_inputs");

  bool pdl = pdl_;
  if (products) {
    pdl = prompt_product_async(index, Linear::kQkv, normed, qkv, count, adapter);
  } else {
    gemv_rows_async(layer.qkv, normed, qkv, count, layer.qkv.weight.rows, Epilogue::store_bf16, index, Linear::kQkv,
                    adapter);
  }
  kernels::RopeKvWriteArgs rope;
  rope.qkv = qkv;
  rope.scales = product_scales(layer.qkv, products, adapter);
  rope.bias = products ? layer.qkv.bias : nullptr;  // the decode kernels add it themselves
  rope.kv = cache_.layer(index);
  rope.rope = layer.rope;
  rope.slots = inputs + count;
  rope.positions = inputs + 2 * count;
  rope.q_out = q;
  rope.num_tokens = count;
  rope.num_heads = config_.num_heads;
  kernels::rope_kv_write_async(rope, stream, pdl);
  if (num_rows == 0) return;

  const int skipped = count - num_rows;
  const auto* sequence = inputs + 3 * count + (skipped > 0 ? 4 : 0);
  kernels::PrefillAttentionArgs attention;
  attention.q = q + static_cast<std::size_t>(skipped) * static_cast<std::size_t>(config_.q_width());
  attention.kv = cache_.layer(index);
  attention.starts = sequence;
  attention.slots = sequence + 2;
  attention.positions = sequence + 3;
  attention.out = arena_.get<__nv_bfloat16>("attended");
  attention.num_sequences = 1;
  attention.max_tokens = num_rows;
  attention.num_heads = config_.num_heads;
  attention.window = config_.window(index);
  attention.scale = attention_scale(config_);
  kernels::prefill_attention_async(attention, stream, pdl_);
  after_attention_async(index, skipped, num_rows, products, adapter);
}

void Decoder::after_attention_async(int index, int skipped, int num_rows, bool products, int adapter) {
  const LayerWeights& layer = weights_.layer(index);
  cudaStream_t stream = stream_.get();
  auto* normed = arena_.get<__nv_bfloat16>("normed");
  auto* delta = arena_.get<__nv_bfloat16>("delta");
  auto* attended = arena_.get<__nv_bfloat16>("attended");
  auto* activated = arena_.get<__nv_bfloat16>("activated");
  const int hidden = config_.hidden_size;
  const auto fp8 = [&](const LinearView& linear) { return multiplies_fp8(linear, products, adapter); };
  auto* x_fp8 = fp8_products_ ? arena_.get<std::uint8_t>("x_fp8") : nullptr;
  auto* x_scales = fp8_products_ ? arena_.get<float>("x_scales") : nullptr;

  if (fp8(layer.o)) quantize_x_async(attended, num_rows, config_.q_width());
  bool pdl = pdl_;
  if (products) {
    pdl = prompt_product_async(index, Linear::kO, attended, delta, num_rows, adapter);
  } else {
    gemv_rows_async(layer.o, attended, delta, num_rows, hidden, Epilogue::store_bf16, index, Linear::kO, adapter);
  }
  kernels::ResidualNormArgs residual;
  residual.delta = delta;
  residual.delta_gain = layer.attn_out_norm;
  residual.scales = product_scales(layer.o, products, adapter);
  residual.bias = products ? layer.o.bias : nullptr;
  residual.residual =
      arena_.get<float>("residual") + static_cast<std::size_t>(skipped) * static_cast<std::size_t>(hidden);
  residual.gain = layer.post_norm;
  residual.eps = config_.rms_norm_eps;
  residual.normed = fp8(layer.gate_up) ? nullptr : normed;
  residual.normed_fp8 = fp8(layer.gate_up) ? x_fp8 : nullptr;
  residual.normed_scales = x_scales;
  residual.num_tokens = num_rows;
  residual.hidden = hidden;
  kernels::residual_norm_async(residual, stream, pdl);

  if (products) {
    kernels::SwigluArgs swiglu;
    swiglu.gate_up = arena_.get<__nv_bfloat16>("gate_up");
    swiglu.scales = product_scales(layer.gate_up, products, adapter);
    swiglu.bias = layer.gate_up.bias;
    swiglu.out = fp8(layer.down) ? nullptr : activated;
    swiglu.out_fp8 = fp8(layer.down) ? x_fp8 : nullptr;
    swiglu.out_scales = x_scales;
    swiglu.num_tokens = num_rows;
    swiglu.width = config_.intermediate_size;
    swiglu.activation = config_.activation;
    pdl = prompt_product_async(index, Linear::kGateUp, normed, arena_.get<__nv_bfloat16>("gate_up"), num_rows, adapter);
    kernels::swiglu_async(swiglu, stream, pdl);
    pdl = prompt_product_async(index, Linear::kDown, activated, delta, num_rows, adapter);
  } else {
    pdl = pdl_;
    gemv_rows_async(layer.gate_up, normed, activated, num_rows, config_.intermediate_size, gate_epilogue(config_),
                    index, Linear::kGateUp, adapter);
    gemv_rows_async(layer.down, activated, delta, num_rows, hidden, Epilogue::store_bf16, index, Linear::kDown,
                    adapter);
  }
  const bool last = index + 1 == config_.num_layers;
  residual.delta_gain = layer.mlp_out_norm;
  residual.scales = product_scales(layer.down, products, adapter);
  residual.bias = products ? layer.down.bias : nullptr;
  residual.gain = last ? nullptr : weights_.layer(index + 1).input_norm;
  const bool next_fp8 = !last && fp8(weights_.layer(index + 1).qkv);
  residual.normed = next_fp8 ? nullptr : normed;
  residual.normed_fp8 = next_fp8 ? x_fp8 : nullptr;
  residual.residual_bf16 = last ? arena_.get<__nv_bfloat16>("residual_bf16") : nullptr;  // for the head
  kernels::residual_norm_async(residual, stream, pdl);
}

void Decoder::gemv_rows_async(const LinearView& linear, const __nv_bfloat16* x, __nv_bfloat16* y, int count,
                              int out_width, Epilogue epilogue, int layer, Linear which, int adapter) {
  x = map_input_async(linear, x, count, false);
  for (int first = 0; first < count; first += kernels::kMaxGemvTokens) {
    // As single tokens are computed: in exact mode a prompt's last token may be alone.
    GemvArgs args =
        gemv_args(linear, kLinearStems[static_cast<int>(which)], std::min(kernels::kMaxGemvTokens, count - first));
    if (config_.row_invariant && !config_.batch_invariant) {
      // One slot: single tokens have kernels of their own, but a prompt's bits must not depend on how it was cut.
      args.batch_invariant = true;
      args.tile = -1;  // a number in another list
    }
    args.x = x + static_cast<std::size_t>(first) * static_cast<std::size_t>(linear.weight.cols);
    args.epilogue = epilogue;
    args.out_bf16 = y + static_cast<std::size_t>(first) * static_cast<std::size_t>(out_width);
    bool pdl = first > 0 && pdl_;
    if (adapter != 0 && adapters_.part(adapter, layer, which).num_a_rows > 0) {
      args.lora = adapters_.view(layer, which, arena_.get<std::int32_t>("lora.prefill_adapters"));
      adapt_async(args, pdl);
      pdl = pdl_;
    }
    kernels::gemv_async(args, stream_.get(), pdl);
  }
}

}  // namespace edgellm
