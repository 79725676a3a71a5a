#include "edgellm/decoder.hpp"

#include <algorithm>
#include <cstring>
#include <stdexcept>

#include "device_attribute.hpp"
#include "edgellm/cuda_try.hpp"
#include "edgellm/kernels/attention_decode.hpp"
#include "edgellm/kernels/embedding.hpp"
#include "edgellm/kernels/rms_norm.hpp"
#include "edgellm/kernels/soft_cap.hpp"
#include "guarded.hpp"

namespace edgellm {
namespace {

using kernels::Epilogue;
using kernels::GemvArgs;

// With what it leaves to the GPU.
DecoderConfig decide_here(const DecoderConfig& config) {
  GpuTraits gpu;
  gpu.l2_bytes = device_attribute(cudaDevAttrL2CacheSize);
  gpu.bus_bits = device_attribute(cudaDevAttrGlobalMemoryBusWidth);
  gpu.has_cublaslt = MatrixProducts::unavailable_reason().empty();
  return decide(config, gpu);
}

}  // namespace

Decoder::Decoder(const DecoderConfig& config)
    : TokenLoop(decide_here(config), plan_memory(decide_here(config))),
      num_sms_(device_attribute(cudaDevAttrMultiProcessorCount)),
      most_splits_(kernels::decode_attention_most_splits(config_.num_kv_heads, num_sms_)),
      weights_(arena_, config_),
      cache_(arena_.get<std::byte>("kv"), config_),
      adapters_(arena_, config_) {
  prepare_products();
  most_multiplied_nodes_ = count_multiplied_nodes();
  prepare_head_product();
  // The attention kernel's counters must start at zero; the cache, so that unwritten positions are finite.
  EDGELLM_CUDA_TRY(
      cudaMemsetAsync(arena_.get<std::byte>("attention"), 0, arena_.plan().size("attention"), stream_.get()));
  if (config_.max_verify_tokens > 0) {
    EDGELLM_CUDA_TRY(cudaMemsetAsync(arena_.get<std::byte>("tree_attention"), 0, arena_.plan().size("tree_attention"),
                                     stream_.get()));
  }
  cache_.clear_async(stream_.get());
  stream_.wait();
}

Decoder::~Decoder() {
  // Kernels may still read the arena, which is about to go.
  EDGELLM_CUDA_WARN(cudaStreamSynchronize(stream_.get()));
}

void Decoder::load_linear(const std::string& stem, const HostTensor& weight, const HostTensor* scale) {
  guarded([&] { weights_.load_linear(stem, weight, scale, stream_.get()); });
}

void Decoder::load_vector(const std::string& name, const HostTensor& values) {
  guarded([&] { weights_.load_vector(name, values, stream_.get()); });
}

void Decoder::load_order(const std::string& stem, const HostTensor& order) {
  guarded([&] { weights_.load_order(stem, order, stream_.get()); });
}

void Decoder::load_vocab_map(const HostTensor& token_ids) {
  guarded([&] { weights_.load_vocab_map(token_ids, stream_.get()); });
}

void Decoder::finish_load() {
  const std::vector<std::string> missing = weights_.missing();
  if (!missing.empty()) throw std::invalid_argument("never loaded: " + missing.front());
  guarded([&] {
    warm_up_adapters();
    for (int batch = 1; batch <= std::min(config_.num_slots, kMaxBatch); ++batch) {
      // Distinct slots: the warm-up writes keys there. Greedy only ever sees the row's default.
      std::int32_t* inputs = take_inputs(3 * kMaxBatch);
      std::fill_n(inputs, 3 * kMaxBatch, 0);
      for (int i = 0; i < batch; ++i) inputs[2 * kMaxBatch + i] = i;
      EDGELLM_CUDA_TRY(cudaMemcpyAsync(arena_.get<std::int32_t>("decode_inputs"), inputs,
                                       3 * kMaxBatch * sizeof(std::int32_t), cudaMemcpyHostToDevice, stream_.get()));
      EDGELLM_CUDA_TRY(cudaMemsetAsync(arena_.get<std::byte>("sampling_rows"), 0, arena_.plan().size("sampling_rows"),
                                       stream_.get()));
      for (const StepTail tail :
           {StepTail::kLogits, StepTail::kGreedy, StepTail::kSample, StepTail::kSampleEverything}) {
        // Once without a graph: CUDA loads a kernel's code at its first launch, which must not be inside a capture.
        record_step_async({batch, tail});
        stream_.wait();
        for (const int most : kernels::kContextClasses) {
          const StepKey key = {batch, tail, 0, context_class(most)};
          if (tail == StepTail::kLogits) record_step_async(key);  // attention's kernels differ, by the batch, too
          stream_.wait();
          (void)graph(key);
          if (config_.capacity <= most) break;
        }
      }
    }
    stream_.wait();
    inputs_used_ = 0;
    warm_up_prompts();
    if (config_.max_verify_tokens > 0) warm_up_verify();
  });
  ready_ = true;
}

GemvArgs Decoder::gemv_args(const LinearView& linear, const char* product, int num_tokens) const {
  GemvArgs args;
  args.weight = linear.weight;
  args.bias = linear.bias;
  args.num_tokens = num_tokens;
  args.norm_eps = config_.rms_norm_eps;
  const auto tile = tiles_.find({product, config_.batch_invariant ? 0 : num_tokens});
  const bool alike =
      tile != tiles_.end() && tile->second.format == linear.weight.format && tile->second.group == linear.weight.group;
  if (alike) args.tile = tile->second.index;
  args.batch_invariant = config_.batch_invariant;
  return args;
}

void Decoder::record_step_async(const StepKey& key) {
  if (multiplies_draft(key)) return record_draft_products_async(key);
  const int batch = key.batch;
  const StepTail tail = key.tail;
  cudaStream_t stream = stream_.get();
  auto* residual = arena_.get<float>("residual");
  auto* residual_bf16 = arena_.get<__nv_bfloat16>("residual_bf16");
  const float* wide_residual = config_.wide_norm_inputs ? residual : nullptr;
  auto* attended = arena_.get<__nv_bfloat16>("attended");
  auto* activated = arena_.get<__nv_bfloat16>("activated");
  auto* qkv = arena_.get<float>("qkv");
  auto* tokens = arena_.get<std::int32_t>("decode_inputs");  // then positions, then slots
  const bool verify = tail == StepTail::kVerify || tail == StepTail::kVerifyExactly;
  const auto adapt = [&](GemvArgs& args, int layer, Linear linear) {
    if ((key.adapted & linear_bit(linear)) == 0) return;
    args.lora = adapters_.view(layer, linear, arena_.get<std::int32_t>("lora.decode_adapters"));
  };
  // The product ends with adding to the residual, or leaves that to a norm of what it adds.
  const auto add_product_async = [&](GemvArgs args, const __nv_bfloat16* norm, bool pdl) {
    args.epilogue = norm ? Epilogue::store_f32 : Epilogue::residual;
    args.out_f32 = norm ? arena_.get<float>("delta_f32") : residual;
    if (!norm) args.out_bf16 = residual_bf16;
    decode_product_async(args, pdl);
    if (!norm) return;
    kernels::ResidualNormArgs added;
    added.delta_f32 = args.out_f32;
    added.delta_gain = norm;
    added.residual = residual;
    added.residual_bf16 = residual_bf16;
    added.eps = config_.rms_norm_eps;
    added.num_tokens = batch;
    added.hidden = config_.hidden_size;
    kernels::residual_norm_async(added, stream, pdl_);
  };
  bool pdl = false;  // the first kernel follows something else
  if (tail == StepTail::kLogits || verify) {
    const std::int32_t* given = verify ? arena_.get<VerifyInputs>("verify_inputs")->token_ids : tokens;
    kernels::embedding_async(weights_.embedding(), given, batch, config_.embed_scale, residual, residual_bf16, stream,
                             pdl);
    pdl = pdl_;
  }
  for (int index = 0; index < config_.num_layers; ++index) {
    const LayerWeights& layer = weights_.layer(index);

    GemvArgs args = gemv_args(layer.qkv, "attn.qkv", batch);
    args.x = residual_bf16;
    args.x_f32 = wide_residual;
    args.gain = layer.input_norm;
    args.epilogue = Epilogue::store_f32;
    args.out_f32 = qkv;
    adapt(args, index, Linear::kQkv);
    pdl = map_args_async(layer.qkv, args, pdl);
    decode_product_async(args, pdl);
    pdl = pdl_;

    if (verify) {
      record_verify_attention_async(index, key, pdl);
    } else {
      kernels::DecodeAttentionArgs attention;
      attention.qkv = qkv;
      attention.kv = cache_.layer(index);
      attention.rope = layer.rope;
      attention.positions = tokens + kMaxBatch;
      attention.slots = tokens + 2 * kMaxBatch;
      attention.out = attended;
      attention.batch = batch;
      attention.num_heads = config_.num_heads;
      attention.window = config_.window(index);
      attention.scale = attention_scale(config_);
      attention.most_splits = most_splits_;
      attention.most_attended =
          attention.window > 0 ? std::min(key.most_attended, attention.window) : key.most_attended;
      attention.workspace = arena_.get<std::byte>("attention");
      kernels::decode_attention_async(attention, stream, pdl);
    }

    args = gemv_args(layer.o, "attn.o", batch);
    args.x = attended;
    adapt(args, index, Linear::kO);
    pdl = map_args_async(layer.o, args, pdl);
    add_product_async(args, layer.attn_out_norm, pdl);

    args = gemv_args(layer.gate_up, "mlp.gate_up", batch);
    args.x = residual_bf16;
    args.x_f32 = wide_residual;
    args.gain = layer.post_norm;
    args.epilogue = gate_epilogue(config_);
    args.out_bf16 = activated;
    adapt(args, index, Linear::kGateUp);
    pdl = map_args_async(layer.gate_up, args, pdl);
    decode_product_async(args, pdl);

    args = gemv_args(layer.down, "mlp.down", batch);
    args.x = activated;
    adapt(args, index, Linear::kDown);
    pdl = map_args_async(layer.down, args, pdl);
    add_product_async(args, layer.mlp_out_norm, pdl);
  }
  record_head_async(batch, residual_bf16, residual, tail == StepTail::kGreedy, pdl);
  if (tail == StepTail::kLogits || verify) return;

  if (tail != StepTail::kGreedy) {
    record_sampling_async(key, pdl);
    return;
  }
  kernels::GreedyArgs greedy;
  greedy.block_max = arena_.get<unsigned long long>("block_max");
  greedy.num_blocks = num_head_blocks(batch);
  greedy.batch = batch;
  greedy.state = decode_state();
  greedy.table = &weights_.embedding();
  greedy.embed_scale = config_.embed_scale;
  greedy.residual = residual;
  greedy.residual_bf16 = residual_bf16;
  kernels::greedy_async(greedy, stream, pdl);
}

GemvArgs Decoder::head_args(int num_rows, bool with_maximum) const {
  LinearView head;
  head.weight = weights_.head();
  GemvArgs args = gemv_args(head, "head", num_rows);
  args.gain = weights_.final_norm();
  args.epilogue = with_maximum ? Epilogue::logits : Epilogue::store_f32;
  args.out_f32 = arena_.get<float>("logits");
  if (with_maximum) args.block_max = arena_.get<unsigned long long>("block_max");
  return args;
}

void Decoder::record_head_async(int num_rows, const __nv_bfloat16* x, const float* residual, bool with_maximum,
                                bool pdl) {
  GemvArgs args = head_args(num_rows, with_maximum);
  args.x = x;
  args.x_f32 = config_.wide_norm_inputs ? residual : nullptr;
  decode_product_async(args, pdl);
  if (!with_maximum) cap_logits_async(num_rows);  // of the largest one alone the cap makes no other
}

void Decoder::cap_logits_async(int num_rows) {
  if (config_.logit_softcap <= 0.0F) return;
  const std::size_t count = static_cast<std::size_t>(num_rows) * static_cast<std::size_t>(config_.num_rows());
  kernels::soft_cap_async(arena_.get<float>("logits"), count, config_.logit_softcap, stream_.get(), pdl_);
}

int Decoder::num_head_blocks(int batch) const { return kernels::gemv_num_blocks(head_args(batch, true)); }

StepKey Decoder::arrange_async(std::span<const std::int32_t> slots, std::span<const std::int32_t> adapters) {
  const unsigned adapted = adapted_linears(adapters);
  if (adapted != 0) upload_adapters_async(adapters);
  StepKey key;
  key.batch = static_cast<int>(slots.size());
  key.adapted = adapted;
  return key;
}

void Decoder::several_async(const SequenceStep& item, int first_row) {
  if (verifies(item)) {
    verify_async(item.slot, item.position, item.token_ids, {}, first_row, item.adapter);
  } else {
    prefill_async(item, first_row);
  }
}

void Decoder::copy_prefix_async(int source, int target, int length) {
  cache_.copy_prefix_async(source, target, length, stream_.get());
}

void Decoder::save_prefix_async(int slot, int length, std::byte* host) {
  cache_.save_prefix_async(slot, length, host, stream_.get());
}

void Decoder::load_prefix_async(int slot, int length, const std::byte* host) {
  cache_.load_prefix_async(slot, length, host, stream_.get());
}

GemvArgs Decoder::product_args(const std::string& product, int batch) const {
  if (product == "head") return head_args(batch, true);
  const auto linears = weights_.layer(config_.num_layers / 2).linears();  // the first may be stored in another format
  for (std::size_t i = 0; i < linears.size(); ++i) {
    if (product == kLinearStems[i]) return gemv_args(*linears[i], "", batch);
  }
  throw std::invalid_argument("the decoder has no product " + product);
}

int Decoder::num_tiles(const std::string& product, int batch) const {
  return kernels::gemv_num_tiles(product_args(product, batch));
}

void Decoder::set_tile(const std::string& product, int batch, int tile) {
  if (tile >= num_tiles(product, batch)) throw std::invalid_argument(product + " has no tile " + std::to_string(tile));
  const kernels::WeightView weight = product_args(product, batch).weight;
  tiles_[{product, config_.batch_invariant ? 0 : batch}] = {weight.format, weight.group, tile};
  std::erase_if(graphs_, [&](const auto& entry) { return config_.batch_invariant || entry.first.batch == batch; });
}

}  // namespace edgellm
