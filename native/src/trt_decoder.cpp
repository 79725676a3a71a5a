#include "edgellm/trt_decoder.hpp"

#include <algorithm>
#include <bit>
#include <numeric>
#include <stdexcept>

#include "edgellm/cuda_try.hpp"
#include "edgellm/kernels/embedding.hpp"

namespace edgellm {
namespace {

// Each context takes some memory of TensorRT's own, each graph some of the driver's. They are made when a combination
// of slots is first seen; beyond this many all are dropped.
constexpr std::size_t kMostContexts = 64;
constexpr std::size_t kMostGraphs = 128;
constexpr std::size_t kMostLayouts = 4096;

std::size_t stride(std::size_t size) {
  return (size + MemoryPlan::kAlignment - 1) / MemoryPlan::kAlignment * MemoryPlan::kAlignment;
}

}  // namespace

TrtDecoder::TrtDecoder(TrtEngine& engine, TrtDecoderConfig config)
    : TokenLoop(config.loop, plan_trt_memory(config, engine.context_bytes())),
      engine_(engine),
      trt_(std::move(config)),
      cache_(arena_.get<std::byte>("kv"), config_, trt_.kv_order(), trt_.engine_capacity),
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
    offset += stride(count * 2);
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
      key.splits = splits_for(1);
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

void TrtDecoder::forget(int adapter) {
  stream_.wait();
  std::erase_if(contexts_, [&](const auto& entry) { return adapter < 0 || entry.first.adapter == adapter; });
  std::erase_if(graphs_, [&](const auto& entry) {
    const Layout& groups = layout(entry.first);
    return adapter < 0 ||
           std::any_of(groups.begin(), groups.end(), [&](const Group& group) { return group.adapter == adapter; });
  });
}

kernels::EngineInputs TrtDecoder::group_inputs(int first_slot) const {
  const auto slot = static_cast<std::size_t>(first_slot);
  const auto rows = static_cast<std::size_t>(trt_.rows_per_group());
  const std::size_t ints = slot * stride(rows * sizeof(std::int64_t));
  const auto at = [&](const char* name) { return reinterpret_cast<std::int64_t*>(arena_.get<std::byte>(name) + ints); };
  kernels::EngineInputs inputs;
  inputs.embeds =
      arena_.get<std::byte>("trt.embeds") + slot * stride(rows * static_cast<std::size_t>(config_.hidden_size) * 2);
  inputs.positions = at("trt.positions");
  inputs.write_indices = at("trt.write_indices");
  inputs.logit_indices = at("trt.logit_indices");
  inputs.is_bf16 = config_.kv_format == kernels::KvFormat::bf16;
  return inputs;
}

float* TrtDecoder::group_logits(int first_slot) const {
  return reinterpret_cast<float*>(arena_.get<std::byte>("trt.logits") +
                                  static_cast<std::size_t>(first_slot) *
                                      stride(static_cast<std::size_t>(config_.num_rows()) * sizeof(float)));
}

int TrtDecoder::lora_rank(int adapter, const TrtTensor& tensor) const {
  const auto& ranks = loras_[static_cast<std::size_t>(adapter)].ranks;
  const auto found = ranks.find(tensor.name);
  return found == ranks.end() ? 0 : found->second;
}

std::byte* TrtDecoder::lora_address(int adapter, std::size_t tensor) const {
  auto* pool = arena_.get<std::byte>("trt.lora");
  const std::size_t each = trt_.adapter_bytes();
  if (lora_rank(adapter, trt_.tensors[tensor]) == 0)
    return pool + each * static_cast<std::size_t>(config_.max_adapters);
  return pool + each * static_cast<std::size_t>(adapter - 1) + lora_offsets_[tensor];
}

void TrtDecoder::bind(TrtContext& context, const kernels::EngineInputs& inputs, float* logits, const ContextKey& key,
                      int length) {
  for (std::size_t i = 0; i < trt_.tensors.size(); ++i) {
    const TrtTensor& tensor = trt_.tensors[i];
    std::vector<std::int64_t> dims = tensor.dims;
    switch (tensor.role) {
      case TrtRole::embeds:
        dims[0] = key.num_rows;
        dims[1] = length;
        context.set_address(tensor.name, inputs.embeds);
        break;
      case TrtRole::positions:
        dims = {key.num_rows, length};
        context.set_address(tensor.name, inputs.positions);
        break;
      case TrtRole::write_indices:
        dims = {key.num_rows};
        context.set_address(tensor.name, inputs.write_indices);
        break;
      case TrtRole::logit_indices:
        dims = {key.num_logits};
        context.set_address(tensor.name, inputs.logit_indices);
        break;
      case TrtRole::logits:
        context.set_address(tensor.name, logits);
        continue;  // outputs have no shape of their own
      case TrtRole::past_key:
      case TrtRole::past_value:
        dims[0] = key.num_rows;
        context.set_address(tensor.name,
                            cache_.tensor(tensor.layer, tensor.role == TrtRole::past_value ? 1 : 0, key.first_slot));
        break;
      case TrtRole::present_key:
      case TrtRole::present_value:  // written in place
        context.set_address(tensor.name,
                            cache_.tensor(tensor.layer, tensor.role == TrtRole::present_value ? 1 : 0, key.first_slot));
        continue;
      case TrtRole::past_kv:
        dims[0] = key.num_rows;
        context.set_address(tensor.name, cache_.tensor(tensor.layer, 0, key.first_slot));
        break;
      case TrtRole::present_kv:
        context.set_address(tensor.name, cache_.tensor(tensor.layer, 0, key.first_slot));
        continue;
      case TrtRole::lora_a:
        dims[1] = lora_rank(key.adapter, tensor);
        context.set_address(tensor.name, lora_address(key.adapter, i));
        break;
      case TrtRole::lora_b:
        dims[0] = lora_rank(key.adapter, tensor);
        context.set_address(tensor.name, lora_address(key.adapter, i));
        break;
    }
    context.set_shape(tensor.name, dims);
  }
}

TrtContext TrtDecoder::make_context(const ContextKey& key) {
  // TensorRT's manual wants a context for each captured graph, for a graph holds the context's state; all of them may
  // share their memory, for one stream runs them.
  TrtContext context = engine_.make_context(arena_.get<std::byte>("trt.context"));
  context.use_profile_async(0, stream_.get());
  bind(context, group_inputs(key.first_slot), group_logits(key.first_slot), key, 1);
  return context;
}

void TrtDecoder::prepare_capture_async(const StepKey& key) {
  const Layout groups = layout(key);
  if (contexts_.size() + groups.size() > kMostContexts || graphs_.size() >= kMostGraphs) forget(-1);
  for (const Group& group : groups) {
    if (contexts_.contains(context_key(group))) continue;
    contexts_.emplace(context_key(group), make_context(context_key(group)));
    // After a change of shapes TensorRT sets itself up in the next enqueue, which cannot be captured. What this one
    // writes, the captured one writes again.
    record_group_async(group, key.batch);
  }
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
  args.out = group_inputs(group.first_slot);
  kernels::engine_rows_async(args, stream_.get());
  contexts_.at(context_key(group)).enqueue_async(stream_.get());
}

float* TrtDecoder::step_logits(const StepKey& key) const {
  const Layout& groups = layout(key);
  return groups.size() == 1 ? group_logits(groups[0].first_slot) : arena_.get<float>("logits");
}

void TrtDecoder::record_step_async(const StepKey& key) {
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

void TrtDecoder::chunk_async(const SequenceStep& item, int start, int count, int num_logits, int first_row,
                             int profile) {
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
  args.out.embeds = arena_.get<std::byte>("trt.chunk_embeds");
  args.out.positions = arena_.get<std::int64_t>("trt.chunk_positions");
  args.out.write_indices = arena_.get<std::int64_t>("trt.chunk_write_indices");
  args.out.logit_indices = arena_.get<std::int64_t>("trt.chunk_logit_indices");
  args.out.is_bf16 = config_.kv_format == kernels::KvFormat::bf16;
  kernels::engine_chunk_async(args, stream_.get());
  chunk_context_.use_profile_async(profile, stream_.get());
  const ContextKey key{item.slot, 1, args.num_logits, item.adapter};
  bind(chunk_context_, args.out, arena_.get<float>("logits"), key, count);
  chunk_context_.enqueue_async(stream_.get());
  if (num_logits > 0) {
    copy_logits_async(arena_.get<float>("logits"), static_cast<std::size_t>(first_row),
                      static_cast<std::size_t>(num_logits));
  }
}

void TrtDecoder::check_adapter(int adapter) const {
  if (adapter < 0 || adapter > config_.max_adapters || !loras_[static_cast<std::size_t>(adapter)].loaded) {
    throw std::invalid_argument("adapter " + std::to_string(adapter) + " is not loaded");
  }
}

void TrtDecoder::load_adapter(int index, std::span<const TrtLoraTensor> tensors) {
  if (index < 1 || index > config_.max_adapters) {
    throw std::invalid_argument("there is no place " + std::to_string(index) + " for an adapter; places are 1 to " +
                                std::to_string(config_.max_adapters));
  }
  Lora lora;
  lora.loaded = true;
  std::vector<std::size_t> places;
  for (const TrtLoraTensor& given : tensors) {
    const auto found = std::find_if(trt_.tensors.begin(), trt_.tensors.end(),
                                    [&](const TrtTensor& tensor) { return tensor.name == given.name; });
    const bool adapts =
        found != trt_.tensors.end() && (found->role == TrtRole::lora_a || found->role == TrtRole::lora_b);
    if (!adapts) throw std::invalid_argument("the engine has no adapter input " + given.name);
    if (given.rank < 1 || given.rank > found->max_rank) {
      throw std::invalid_argument(given.name + " has rank " + std::to_string(given.rank) + "; the engine takes 1 to " +
                                  std::to_string(found->max_rank));
    }
    std::size_t bytes = static_cast<std::size_t>(given.rank) * 2;
    for (const std::int64_t size : found->dims) bytes *= size < 0 ? 1 : static_cast<std::size_t>(size);
    if (bytes != given.data.size()) {
      throw std::invalid_argument(given.name + " has " + std::to_string(given.data.size()) + " bytes; rank " +
                                  std::to_string(given.rank) + " has " + std::to_string(bytes));
    }
    places.push_back(static_cast<std::size_t>(found - trt_.tensors.begin()));
    lora.ranks[given.name] = given.rank;
  }
  guarded([&] {
    forget(index);  // waits for a run under way, which reads the adapters
    loras_[static_cast<std::size_t>(index)] = std::move(lora);
    for (std::size_t i = 0; i < tensors.size(); ++i) {
      EDGELLM_CUDA_TRY(cudaMemcpyAsync(lora_address(index, places[i]), tensors[i].data.data(), tensors[i].data.size(),
                                       cudaMemcpyHostToDevice, stream_.get()));
    }
    stream_.wait();
  });
}

void TrtDecoder::unload_adapter(int index) {
  check_adapter(index);
  if (index == 0) throw std::invalid_argument("place 0 is no adapter");
  guarded([&] {
    forget(index);
    loras_[static_cast<std::size_t>(index)] = {};
  });
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
