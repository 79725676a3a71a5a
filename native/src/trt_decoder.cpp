#include "edgellm/trt_decoder.hpp"

#include <algorithm>
#include <bit>
#include <numeric>
#include <stdexcept>

#include "edgellm/cuda_try.hpp"
#include "edgellm/kernels/embedding.hpp"

namespace edgellm {
namespace {

constexpr std::size_t kMostLayouts = 4096;  // combinations of slots; beyond them all are forgotten

}  // namespace

TrtDecoder::TrtDecoder(TrtEngine& engine, TrtDecoderConfig config)
    : TokenLoop(config.loop, plan_trt_memory(config, engine.context_bytes())),
      engine_(engine),
      trt_(std::move(config)),
      cache_(arena_.get<std::byte>("kv"), config_, trt_.kv_order(), trt_.engine_capacity),
      windows_(trt_.mask_windows()),
      chunk_context_(engine.make_context(arena_.get<std::byte>("trt.context"))),
      loras_(static_cast<std::size_t>(config_.max_adapters) + 1) {
  embedding_.format = config_.embedding_format;
  embedding_.data = arena_.get<std::byte>("embed.weight");
  if (arena_.plan().contains("embed.scale")) embedding_.scales = arena_.get<std::byte>("embed.scale");
  embedding_.rows = config_.vocab_size;
  embedding_.cols = config_.hidden_size;
  embedding_.group = config_.group_size;
  loras_[0].loaded = true;
  std::size_t offset = 0;
  for (const TrtTensor& tensor : trt_.tensors) {
    lora_offsets_.push_back(offset);
    if (tensor.role != TrtRole::lora_a && tensor.role != TrtRole::lora_b) continue;
    std::size_t count = static_cast<std::size_t>(tensor.max_rank);
    for (const std::int64_t size : tensor.dims) count *= size < 0 ? 1 : static_cast<std::size_t>(size);
    offset += trt_stride(count * 2);
  }
  EDGELLM_CUDA_TRY(
      cudaMemsetAsync(arena_.get<std::byte>("residual"), 0, arena_.plan().size("residual"), stream_.get()));
  cache_.clear_async(stream_.get());
  stream_.wait();
}

TrtDecoder::~TrtDecoder() {
  // Contexts may still be at work, and are about to go.
  EDGELLM_CUDA_WARN(cudaStreamSynchronize(stream_.get()));
}

const std::int32_t* TrtDecoder::row_tokens() const {
  return config_.head_rows > 0 ? arena_.get<std::int32_t>("vocab_map") : nullptr;
}

void TrtDecoder::load_embedding(const HostTensor& values, const HostTensor* scale) {
  const bool int8 = config_.embedding_format == kernels::WeightFormat::int8;
  const DType dtype =
      int8 ? DType::kInt8
           : (config_.embedding_format == kernels::WeightFormat::fp16 ? DType::kFloat16 : DType::kBFloat16);
  const Shape shape{config_.vocab_size, config_.hidden_size};
  if (values.dtype != dtype || !(values.shape == shape)) {
    throw std::invalid_argument("the embedding is " + std::string(name_of(values.dtype)) + " " +
                                values.shape.to_string() + "; it must be " + name_of(dtype) + " " + shape.to_string());
  }
  if (int8 && (scale == nullptr || scale->dtype != DType::kFloat16 ||
               !(scale->shape == Shape{config_.vocab_size, config_.hidden_size / config_.group_size}))) {
    throw std::invalid_argument("the embedding needs fp16 scales, one for each group of a row");
  }
  guarded([&] {
    EDGELLM_CUDA_TRY(cudaMemcpyAsync(arena_.get<std::byte>("embed.weight"), values.data,
                                     arena_.plan().size("embed.weight"), cudaMemcpyHostToDevice, stream_.get()));
    if (int8) {
      EDGELLM_CUDA_TRY(cudaMemcpyAsync(arena_.get<std::byte>("embed.scale"), scale->data,
                                       arena_.plan().size("embed.scale"), cudaMemcpyHostToDevice, stream_.get()));
    }
    stream_.wait();
  });
  has_embedding_ = true;
}

void TrtDecoder::load_vocab_map(const HostTensor& token_ids) {
  if (config_.head_rows == 0 || token_ids.dtype != DType::kInt32 || !(token_ids.shape == Shape{config_.head_rows})) {
    throw std::invalid_argument("a vocabulary map has " + std::to_string(config_.head_rows) + " int32 token ids");
  }
  guarded([&] {
    EDGELLM_CUDA_TRY(cudaMemcpyAsync(arena_.get<std::byte>("vocab_map"), token_ids.data,
                                     arena_.plan().size("vocab_map"), cudaMemcpyHostToDevice, stream_.get()));
    stream_.wait();
  });
  has_vocab_map_ = true;
}

void TrtDecoder::finish_load() {
  if (!has_embedding_) throw std::invalid_argument("never loaded: embed.weight");
  if (config_.head_rows > 0 && !has_vocab_map_) throw std::invalid_argument("never loaded: vocab_map");
  guarded([&] { warm_up(); });
}

// Runs what CUDA and TensorRT set up at its first use, which must not be inside a capture nor in an answer.
void TrtDecoder::warm_up() {
  const std::int32_t token = 0;
  const int last = engine_.num_profiles() - 1;
  reserve_logits(trt_.max_logits);
  for (int profile = 0; profile <= last; ++profile) {
    const int most = profile == last ? config_.max_tokens : trt_.decode_tokens;
    for (const int count : {1, std::min(most, config_.capacity)}) {
      const std::vector<std::int32_t> tokens(static_cast<std::size_t>(count), token);
      SequenceStep item;
      item.token_ids = tokens;
      chunk_async(item, 0, count, std::min(count, trt_.max_logits), 0, profile);
      stream_.wait();
      inputs_used_ = 0;
    }
  }
  std::int32_t* inputs = take_inputs(3 * kMaxBatch);
  for (int slot = 0; slot < config_.num_slots; ++slot) {
    std::fill_n(inputs, 3 * kMaxBatch, 0);
    inputs[2 * kMaxBatch] = slot;
    EDGELLM_CUDA_TRY(cudaMemcpyAsync(arena_.get<std::int32_t>("decode_inputs"), inputs,
                                     3 * kMaxBatch * sizeof(std::int32_t), cudaMemcpyHostToDevice, stream_.get()));
    EDGELLM_CUDA_TRY(
        cudaMemsetAsync(arena_.get<std::byte>("sampling_rows"), 0, arena_.plan().size("sampling_rows"), stream_.get()));
    const std::int32_t none = 0;
    StepKey key = arrange_async(std::span(&slot, 1), std::span(&none, 1));
    for (const StepTail tail : {StepTail::kLogits, StepTail::kSample, StepTail::kSampleEverything}) {
      key.tail = tail;
      key.most_attended = context_class(1);
      if (slot == 0) {
        prepare_capture_async(key);
        record_step_async(key);
      }
      if (tail != StepTail::kSampleEverything) (void)graph(key);
    }
    stream_.wait();  // the pinned inputs are written again
  }
  // What was written on the way is not an answer's.
  EDGELLM_CUDA_TRY(
      cudaMemsetAsync(arena_.get<std::byte>("decode_inputs"), 0, arena_.plan().size("decode_inputs"), stream_.get()));
  EDGELLM_CUDA_TRY(
      cudaMemsetAsync(arena_.get<std::byte>("token_counts"), 0, arena_.plan().size("token_counts"), stream_.get()));
  cache_.clear_async(stream_.get());
  stream_.wait();
  inputs_used_ = 0;
}

int TrtDecoder::Group::num_logits() const { return std::popcount(members); }

TrtDecoder::ContextKey TrtDecoder::context_key(const Group& group) {
  return {group.first_slot, group.num_rows, group.num_logits(), group.adapter};
}

StepKey TrtDecoder::arrange_async(std::span<const std::int32_t> slots, std::span<const std::int32_t> adapters) {
  std::vector<std::size_t> order(slots.size());
  std::iota(order.begin(), order.end(), std::size_t{0});
  std::sort(order.begin(), order.end(), [&](std::size_t a, std::size_t b) { return slots[a] < slots[b]; });
  Layout found;
  for (const std::size_t i : order) {
    check_adapter(adapters[i]);
    const int slot = slots[i];
    const bool joins =
        !found.empty() && found.back().adapter == adapters[i] && slot - found.back().first_slot < trt_.rows_per_group();
    if (!joins) found.push_back({slot, 1, adapters[i], 0});
    found.back().num_rows = slot - found.back().first_slot + 1;
    found.back().members |= std::uint32_t{1} << i;
  }
  auto number = layout_numbers_.find(found);
  if (number == layout_numbers_.end()) {
    if (layouts_.size() >= kMostLayouts) {  // no run goes on past this: graphs of the old numbers may go
      forget(-1);
      layouts_.clear();
      layout_numbers_.clear();
    }
    number = layout_numbers_.emplace(found, static_cast<int>(layouts_.size())).first;
    layouts_.push_back(std::move(found));
  }
  StepKey key;
  key.batch = static_cast<int>(slots.size());
  key.layout = number->second;
  return key;
}

void TrtDecoder::record_group_async(const Group& group, int batch) {
  const auto* inputs = arena_.get<std::int32_t>("decode_inputs");  // tokens, then positions, then slots
  kernels::EngineRowsArgs args;
  args.positions = inputs + kMaxBatch;
  args.slots = inputs + 2 * kMaxBatch;
  args.residual = arena_.get<float>("residual");
  args.batch = batch;
  args.members = group.members;
  args.hidden = config_.hidden_size;
  args.first_slot = group.first_slot;
  args.num_rows = group.num_rows;
  args.idle_place = trt_.engine_capacity - 1;
  const Inputs group_in = group_inputs(group.first_slot);
  args.out = group_in.each;
  kernels::engine_rows_async(args, stream_.get());
  record_masks_async(group_in, group.num_rows);
  contexts_.at(context_key(group)).enqueue_async(stream_.get());
}

float* TrtDecoder::step_logits(const StepKey& key) const {
  const Layout& groups = layout(key);
  return groups.size() == 1 ? group_logits(groups[0].first_slot) : arena_.get<float>("logits");
}

void TrtDecoder::record_step_async(const StepKey& key) {
  if (key.tail == StepTail::kVerify) return record_verify_async(key);
  if (key.tail == StepTail::kLogits) {
    kernels::embedding_async(embedding_, arena_.get<std::int32_t>("decode_inputs"), key.batch, config_.embed_scale,
                             arena_.get<float>("residual"), arena_.get<__nv_bfloat16>("residual_bf16"), stream_.get(),
                             false);
  }
  const Layout& groups = layout(key);
  for (const Group& group : groups) record_group_async(group, key.batch);
  if (groups.size() > 1) {  // rows in the order of the step's sequences
    const auto vocab = static_cast<std::size_t>(config_.num_rows());
    for (const Group& group : groups) {
      const float* row = group_logits(group.first_slot);
      for (int i = 0; i < key.batch; ++i) {
        if ((group.members >> i & 1) == 0) continue;
        EDGELLM_CUDA_TRY(cudaMemcpyAsync(arena_.get<float>("logits") + static_cast<std::size_t>(i) * vocab, row,
                                         vocab * sizeof(float), cudaMemcpyDeviceToDevice, stream_.get()));
        row += vocab;
      }
    }
  }
  if (key.tail != StepTail::kLogits) record_sampling_async(key, false);
}

StepTail TrtDecoder::sampling_class(std::span<const RunSequence> sequences) const {
  const StepTail tail = TokenLoop::sampling_class(sequences);
  return tail == StepTail::kGreedy ? StepTail::kSample : tail;  // the head's maxima are not known
}

void TrtDecoder::several_async(const SequenceStep& item, int first_row) {
  const auto length = static_cast<int>(item.token_ids.size());
  if (length <= most_nodes() && item.num_logits == length) {
    return verify_async(item.slot, item.position, item.token_ids, {}, first_row, item.adapter);
  }
  const int last = engine_.num_profiles() - 1;
  int row = first_row;
  for (int start = 0; start < length;) {
    int count = std::min(length - start, config_.max_tokens);
    const auto wanted = [&] { return std::min(count, std::max(0, start + count - (length - item.num_logits))); };
    if (wanted() > trt_.max_logits) count -= wanted() - trt_.max_logits;
    const int num_logits = wanted();
    chunk_async(item, start, count, num_logits, row, count <= trt_.decode_tokens ? 0 : last);
    row += num_logits;
    start += count;
  }
}

void TrtDecoder::verify_async(int slot, int position, std::span<const std::int32_t> token_ids,
                              std::span<const std::int32_t> parents, int first_row, int adapter) {
  const auto count = static_cast<int>(token_ids.size());
  VerifyInputs inputs = draft_inputs(slot, position, token_ids, parents);
  // One graph for each power of two; behind the draft come tokens that nobody asked for, whose places are free.
  const int padded = std::min(verify_class(count), most_nodes());
  for (int i = count; i < padded; ++i) {
    inputs.depths[i] = i;
    inputs.masks[i] = std::uint64_t{1} << i;
  }
  upload_verify_inputs_async(inputs);
  if (padded < 2 || position + padded > trt_.engine_capacity) {
    chunk_async({slot, token_ids, position, count, adapter}, 0, count, count, first_row, 0, !is_chain(parents));
    return;
  }
  const std::int32_t one_slot = slot, one_adapter = adapter;
  StepKey key = arrange_async(std::span(&one_slot, 1), std::span(&one_adapter, 1));
  key.batch = padded;
  key.tail = StepTail::kVerify;
  run_step_async(key);
  copy_logits_async(arena_.get<float>("logits"), static_cast<std::size_t>(first_row), static_cast<std::size_t>(count));
}

TrtDecoder::ContextKey TrtDecoder::verify_context_key(const StepKey& key) const {
  const Group& group = layout(key).front();
  return {group.first_slot, 1, key.batch, group.adapter, key.batch};
}

void TrtDecoder::record_verify_async(const StepKey& key) {
  const auto* draft = arena_.get<VerifyInputs>("verify_inputs");
  auto* residual = arena_.get<float>("residual");
  kernels::embedding_async(embedding_, draft->token_ids, key.batch, config_.embed_scale, residual,
                           arena_.get<__nv_bfloat16>("residual_bf16"), stream_.get(), false);
  const Inputs inputs = chunk_inputs();
  kernels::EngineChunkArgs args;
  args.residual = residual;
  args.num_tokens = key.batch;
  args.hidden = config_.hidden_size;
  args.start = &draft->position;
  args.num_logits = key.batch;
  args.depths = draft->depths;
  args.masks = draft->masks;
  args.out = inputs.each;
  kernels::engine_chunk_async(args, stream_.get());
  record_masks_async(inputs, key.batch, draft);
  contexts_.at(verify_context_key(key)).enqueue_async(stream_.get());
}

void TrtDecoder::chunk_async(const SequenceStep& item, int start, int count, int num_logits, int first_row, int profile,
                             bool is_tree) {
  std::int32_t* inputs = take_inputs(static_cast<std::size_t>(count));
  std::copy_n(item.token_ids.begin() + start, count, inputs);
  auto* tokens = arena_.get<std::int32_t>("trt.tokens");
  EDGELLM_CUDA_TRY(cudaMemcpyAsync(tokens, inputs, static_cast<std::size_t>(count) * sizeof(std::int32_t),
                                   cudaMemcpyHostToDevice, stream_.get()));
  auto* residual = arena_.get<float>("residual");
  kernels::embedding_async(embedding_, tokens, count, config_.embed_scale, residual,
                           arena_.get<__nv_bfloat16>("residual_bf16"), stream_.get(), false);
  kernels::EngineChunkArgs args;
  args.residual = residual;
  args.num_tokens = count;
  args.hidden = config_.hidden_size;
  args.position = item.position + start;
  args.num_logits = std::max(num_logits, 1);  // the engine computes one at least
  const VerifyInputs* tree = is_tree ? arena_.get<VerifyInputs>("verify_inputs") : nullptr;
  if (is_tree) {
    args.depths = tree->depths;
    args.masks = tree->masks;
  }
  const Inputs inputs_of_engine = chunk_inputs();
  args.out = inputs_of_engine.each;
  kernels::engine_chunk_async(args, stream_.get());
  record_masks_async(inputs_of_engine, count, tree);
  chunk_context_.use_profile_async(profile, stream_.get());
  const ContextKey key{item.slot, 1, args.num_logits, item.adapter};
  bind(chunk_context_, inputs_of_engine, arena_.get<float>("logits"), key, count);
  chunk_context_.enqueue_async(stream_.get());
  if (num_logits > 0) {
    copy_logits_async(arena_.get<float>("logits"), static_cast<std::size_t>(first_row),
                      static_cast<std::size_t>(num_logits));
  }
}

void TrtDecoder::copy_prefix_async(int source, int target, int length) {
  cache_.copy_prefix_async(source, target, length, stream_.get());
}

void TrtDecoder::save_prefix_async(int slot, int length, std::byte* host) {
  cache_.save_prefix_async(slot, length, host, stream_.get());
}

void TrtDecoder::load_prefix_async(int slot, int length, const std::byte* host) {
  cache_.load_prefix_async(slot, length, host, stream_.get());
}

}  // namespace edgellm
