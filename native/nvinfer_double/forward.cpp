#include "forward.hpp"

#include <algorithm>
#include <cmath>
#include <stdexcept>

#include "double_kernels.hpp"
#include "edgellm/cuda_try.hpp"
#include "edgellm/kernels/attention_decode.hpp"
#include "edgellm/kernels/attention_prefill.hpp"
#include "edgellm/kernels/gemv.hpp"
#include "edgellm/kernels/rms_norm.hpp"
#include "edgellm/kernels/rope.hpp"
#include "edgellm/kernels/soft_cap.hpp"
#include "edgellm/stream.hpp"

namespace edgellm::nvinfer_double {
namespace {

using kernels::Epilogue;
using kernels::GemvArgs;

// The arena of a decoder that only holds weights: everything else is as small as it may be.
DecoderConfig weights_only(DecoderConfig config) {
  config.num_slots = 1;
  config.capacity = 1;
  config.max_tokens = kernels::kMaxGemvTokens;
  config.max_verify_tokens = 0;
  config.fp8_prefill = false;
  config.has_cublaslt = false;
  return config;
}

std::size_t element_bytes(const DecoderConfig& config) { return kernels::kv_element_bytes(config.kv_format); }

std::size_t head_bytes(const DecoderConfig& config) {
  return static_cast<std::size_t>(config.capacity) * static_cast<std::size_t>(config.head_dim) * element_bytes(config);
}

HostTensor host_tensor(const StoredWeight& weight) { return {weight.bytes.data(), weight.dtype, weight.shape}; }

const StoredWeight* find(const Plan& plan, const std::string& name) {
  const auto found =
      std::find_if(plan.weights.begin(), plan.weights.end(), [&](const StoredWeight& w) { return w.name == name; });
  return found == plan.weights.end() ? nullptr : &*found;
}

bool is_matrix(const StoredWeight& weight) {
  return weight.shape.rank() == 2 && weight.name.ends_with(".weight") && !weight.name.starts_with("rope");
}

}  // namespace

struct Forward::Step {
  const BoundTensors& bound;
  const MemoryPlan& workspace;
  std::byte* memory;
  cudaStream_t stream;
  int num_tokens;

  template <typename T>
  T* get(const char* name) const {
    return reinterpret_cast<T*>(memory + workspace.offset(name));
  }
};

std::vector<int> windows_of(const DecoderConfig& config) {
  std::vector<int> windows;
  for (int layer = 0; layer < config.num_layers; ++layer) {
    const int window = config.window(layer);
    if (std::find(windows.begin(), windows.end(), window) == windows.end()) windows.push_back(window);
  }
  return windows;
}

Limits limits_of(const Plan& plan, const Profile& profile) {
  Limits limits;
  for (const Binding& binding : plan.bindings) {
    if (!binding.is_input) continue;
    const Sizes& largest = profile.find(binding.name)->second.largest;
    if (binding.role == "embeds" && largest.size() == 3) {
      limits.batch = static_cast<int>(largest[0]);
      limits.length = static_cast<int>(largest[1]);
      limits.tokens = limits.batch * limits.length;
    } else if (binding.role == "logit_indices" && largest.size() == 1) {
      limits.num_logits = static_cast<int>(largest[0]);
    } else if (binding.role == "lora_a" && largest.size() == 2) {
      limits.lora_rank = std::max(limits.lora_rank, static_cast<int>(largest[1]));
    }
    limits.trees = limits.trees || binding.role == "mask" || binding.role == "tree_masks";
  }
  if (limits.batch > kernels::kMaxDecodeBatch) {
    throw std::invalid_argument("a profile has " + std::to_string(limits.batch) + " sequences; the double takes " +
                                std::to_string(kernels::kMaxDecodeBatch));
  }
  if (limits.lora_rank > kernels::kMaxLoraRank) {
    throw std::invalid_argument("a profile has adapters of rank " + std::to_string(limits.lora_rank) +
                                " over stacked projections; the double takes " + std::to_string(kernels::kMaxLoraRank));
  }
  return limits;
}

MemoryPlan plan_workspace(const DecoderConfig& config, const Limits& limits) {
  MemoryPlan plan;
  const auto tokens = static_cast<std::size_t>(limits.tokens), batch = static_cast<std::size_t>(limits.batch);
  const auto hidden = static_cast<std::size_t>(config.hidden_size), q = static_cast<std::size_t>(config.q_width());
  const auto add = [&plan](const char* name, std::size_t bytes) { plan.add("workspace", name, bytes); };
  add("places", tokens * sizeof(std::int32_t));
  add("slots", tokens * sizeof(std::int32_t));
  add("starts", (batch + 1) * sizeof(std::int32_t));
  add("sequence_slots", batch * sizeof(std::int32_t));
  add("first_places", batch * sizeof(std::int32_t));
  add("logit_rows", static_cast<std::size_t>(limits.num_logits) * sizeof(std::int32_t));
  add("ones", kernels::kMaxGemvTokens * sizeof(std::int32_t));
  add("residual", tokens * hidden * sizeof(float));
  add("residual_bf16", tokens * hidden * 2);
  add("qkv", tokens * static_cast<std::size_t>(config.qkv_width()) * sizeof(float));
  add("q", tokens * q * 2);
  add("attended", tokens * q * 2);
  if (config.output_norms) add("delta_f32", tokens * hidden * sizeof(float));
  add("activated", tokens * static_cast<std::size_t>(config.intermediate_size) * 2);
  add("gathered", static_cast<std::size_t>(limits.num_logits) * hidden * 2);
  add("kv", batch * 2 * static_cast<std::size_t>(config.num_kv_heads) * head_bytes(config));
  // Padding at the end of a full cache is looked for behind it.
  add("behind_kv",
      static_cast<std::size_t>(limits.length) * static_cast<std::size_t>(config.head_dim) * element_bytes(config));
  add("attention", kernels::decode_attention_workspace_bytes(limits.batch, config.num_heads, config.head_dim));
  if (limits.trees) {
    add("depths", tokens * sizeof(std::int32_t));
    // Of each window, for masks may differ; one is enough where they are bits.
    add("nodes", tokens * windows_of(config).size() * sizeof(std::uint64_t));
    const int most = limits.batch * std::min(limits.length, kMostTreeTokens);
    add("tree_attention", kernels::tree_attention_workspace_bytes(most, config.num_heads, config.head_dim));
  }
  if (limits.lora_rank > 0) {
    const auto rank = static_cast<std::size_t>(kernels::padded_lora_rank(limits.lora_rank));
    std::size_t in = 0;
    std::size_t out = 0;
    for (const LinearShape& linear : layer_linears(config)) {
      in = std::max(in, static_cast<std::size_t>(linear.cols));
      out = std::max(out, static_cast<std::size_t>(linear.rows));
    }
    add("lora.a", in * rank * 2);
    add("lora.b", out * rank * 2);
    add("lora.entry", sizeof(kernels::LoraLinear));
    add("lora.h", kernels::kMaxGemvTokens * rank * sizeof(float));
  }
  return plan;
}

Forward::Forward(const Plan& plan)
    : config_(plan.decoder),
      is_bf16_(plan.is_bf16),
      faults_(plan.faults),
      arena_(plan_memory(weights_only(config_))),
      weights_(arena_, config_),
      executions_(sizeof(std::uint32_t)) {
  int device = 0;
  int num_sms = 0;
  EDGELLM_CUDA_TRY(cudaGetDevice(&device));
  EDGELLM_CUDA_TRY(cudaDeviceGetAttribute(&num_sms, cudaDevAttrMultiProcessorCount, device));
  most_splits_ = kernels::decode_attention_most_splits(config_.num_kv_heads, num_sms);
  const Stream stream;
  EDGELLM_CUDA_TRY(cudaMemsetAsync(executions_.data(), 0, executions_.size(), stream.get()));
  for (const StoredWeight& weight : plan.weights) {
    if (weight.name.ends_with(".scale")) continue;  // goes with its weight
    if (weight.name == "vocab_map") {
      weights_.load_vocab_map(host_tensor(weight), stream.get());
      continue;
    }
    if (!is_matrix(weight)) {
      weights_.load_vector(weight.name, host_tensor(weight), stream.get());
      continue;
    }
    const std::string stem = weight.name.substr(0, weight.name.size() - std::string_view(".weight").size());
    const StoredWeight* stored = find(plan, stem + ".scale");
    const HostTensor scale = stored != nullptr ? host_tensor(*stored) : HostTensor{};
    weights_.load_linear(stem, host_tensor(weight), stored != nullptr ? &scale : nullptr, stream.get());
  }
  stream.wait();
  const std::vector<std::string> missing = weights_.missing();
  if (!missing.empty()) throw std::invalid_argument("the plan has no weight " + missing.front());
}

void Forward::enqueue_async(const BoundTensors& bound, const MemoryPlan& workspace, std::byte* memory,
                            cudaStream_t stream) {
  const Step step{bound, workspace, memory, stream, bound.batch * bound.length};
  // Whatever the caller keeps in this memory, or believes to be there still, does not survive.
  EDGELLM_CUDA_TRY(cudaMemsetAsync(memory, 0xff, workspace.total(), stream));
  EDGELLM_CUDA_TRY(cudaMemsetAsync(step.get<std::byte>("attention"), 0, workspace.size("attention"), stream));
  EDGELLM_CUDA_TRY(cudaMemsetAsync(step.get<std::byte>("behind_kv"), 0, workspace.size("behind_kv"), stream));
  if (bound.is_tree()) {
    const std::size_t size = workspace.size("tree_attention");
    EDGELLM_CUDA_TRY(cudaMemsetAsync(step.get<std::byte>("tree_attention"), 0, size, stream));
  }
  auto* executions = reinterpret_cast<std::uint32_t*>(executions_.data());
  count_execution_async(executions, faults_.execution_trap, stream);

  PrepareArgs prepare;
  prepare.positions = bound.positions;
  prepare.write_indices = bound.write_indices;
  prepare.logit_indices = bound.logit_indices;
  prepare.batch = bound.batch;
  prepare.length = bound.length;
  prepare.num_logits = bound.num_logits;
  prepare.capacity = config_.capacity;
  prepare.num_positions = config_.num_positions;
  prepare.places = step.get<std::int32_t>("places");
  prepare.slots = step.get<std::int32_t>("slots");
  prepare.starts = step.get<std::int32_t>("starts");
  prepare.sequence_slots = step.get<std::int32_t>("sequence_slots");
  prepare.first_places = step.get<std::int32_t>("first_places");
  prepare.logit_rows = step.get<std::int32_t>("logit_rows");
  prepare.ones = step.get<std::int32_t>("ones");
  if (bound.is_tree()) prepare.depths = step.get<std::int32_t>("depths");
  prepare_async(prepare, stream);
  check_masks_async(step);

  auto* residual_bf16 = step.get<__nv_bfloat16>("residual_bf16");
  const auto hidden = static_cast<std::size_t>(config_.hidden_size);
  embed_async(bound.embeds, is_bf16_, static_cast<std::size_t>(step.num_tokens) * hidden, step.get<float>("residual"),
              residual_bf16, stream);
  for (int index = 0; index < config_.num_layers; ++index) layer_async(index, step);

  auto* gathered = step.get<__nv_bfloat16>("gathered");
  gather_rows_async(residual_bf16, prepare.logit_rows, bound.num_logits, config_.hidden_size, gathered, stream);
  GemvArgs head;
  head.weight = weights_.head();
  head.x = gathered;
  head.gain = weights_.final_norm();
  head.epilogue = Epilogue::store_f32;
  head.out_f32 = bound.logits;
  gemv_async(head, bound.num_logits, config_.num_rows(), false, stream);
  if (config_.logit_softcap > 0.0F) {
    const auto count = static_cast<std::size_t>(bound.num_logits) * static_cast<std::size_t>(config_.num_rows());
    kernels::soft_cap_async(bound.logits, count, config_.logit_softcap, stream, false);
  }
  spoil_logits_async(prepare.logit_rows, bound.num_logits, config_.num_rows(), executions, faults_.execution_nan,
                     bound.logits, stream);
}

void Forward::layer_async(int index, const Step& step) const {
  const LayerWeights& layer = weights_.layer(index);
  auto* residual_bf16 = step.get<__nv_bfloat16>("residual_bf16");
  auto* activated = step.get<__nv_bfloat16>("activated");
  const auto args_for = [](const LinearView& linear, const __nv_bfloat16* x, const __nv_bfloat16* gain) {
    GemvArgs args;
    args.weight = linear.weight;
    args.bias = linear.bias;
    args.x = x;
    args.gain = gain;
    return args;
  };

  GemvArgs args = args_for(layer.qkv, residual_bf16, layer.input_norm);
  args.epilogue = Epilogue::store_f32;
  args.out_f32 = step.get<float>("qkv");
  linear_async(index, Linear::kQkv, args, config_.qkv_width(), step);

  attention_async(index, step);

  args = args_for(layer.o, step.get<__nv_bfloat16>("attended"), nullptr);
  add_async(index, Linear::kO, args, layer.attn_out_norm, step);

  args = args_for(layer.gate_up, residual_bf16, layer.post_norm);
  args.epilogue = config_.activation == kernels::Activation::gelu_tanh ? Epilogue::geglu : Epilogue::swiglu;
  args.out_bf16 = activated;
  linear_async(index, Linear::kGateUp, args, config_.intermediate_size, step);

  args = args_for(layer.down, activated, nullptr);
  add_async(index, Linear::kDown, args, layer.mlp_out_norm, step);
}

// A product that is added to the residual, or whose norm is.
void Forward::add_async(int index, Linear which, GemvArgs args, const __nv_bfloat16* norm, const Step& step) const {
  auto* residual = step.get<float>("residual");
  auto* residual_bf16 = step.get<__nv_bfloat16>("residual_bf16");
  args.epilogue = norm != nullptr ? Epilogue::store_f32 : Epilogue::residual;
  args.out_f32 = norm != nullptr ? step.get<float>("delta_f32") : residual;
  if (norm == nullptr) args.out_bf16 = residual_bf16;
  linear_async(index, which, args, config_.hidden_size, step);
  if (norm == nullptr) return;
  kernels::ResidualNormArgs added;
  added.delta_f32 = args.out_f32;
  added.delta_gain = norm;
  added.residual = residual;
  added.residual_bf16 = residual_bf16;
  added.eps = config_.rms_norm_eps;
  added.num_tokens = step.num_tokens;
  added.hidden = config_.hidden_size;
  kernels::residual_norm_async(added, step.stream, false);
}

void Forward::check_masks_async(const Step& step) const {
  const BoundTensors& bound = step.bound;
  CheckMaskArgs check;
  check.is_bf16 = is_bf16_;
  check.is_tree = bound.is_tree();
  check.positions = bound.positions;
  check.write_indices = bound.write_indices;
  check.batch = bound.batch;
  check.length = bound.length;
  check.capacity = config_.capacity;
  check.places = step.get<std::int32_t>("places");
  if (check.is_tree) check.nodes = step.get<std::uint64_t>("nodes");
  for (const BoundMask& mask : bound.masks) {
    check.mask = mask.data;
    check.window = mask.window;
    check_mask_async(check, step.stream);
    if (check.is_tree) check.nodes += step.num_tokens;
  }
  if (bound.tree_masks != nullptr && check.is_tree) {
    check.tree_masks = bound.tree_masks;
    check_mask_async(check, step.stream);
  }
  auto* rows = step.get<std::int32_t>("logit_rows");
  drop_rows_async(check.places, rows, bound.num_logits, step.stream);
}

void Forward::attention_async(int index, const Step& step) const {
  const LayerWeights& layer = weights_.layer(index);
  const BoundTensors& bound = step.bound;
  const auto at = static_cast<std::size_t>(index);
  kernels::KvLayer kv;
  kv.data = step.get<std::byte>("kv");
  kv.format = config_.kv_format;
  kv.num_kv_heads = config_.num_kv_heads;
  kv.capacity = config_.capacity;
  kv.head_dim = config_.head_dim;

  // The kernels' slots hold keys and values side by side: the bound caches are copied there.
  const std::size_t part = static_cast<std::size_t>(config_.num_kv_heads) * head_bytes(config_);
  auto* slots = step.get<std::byte>("kv");
  const auto batch = static_cast<std::size_t>(bound.batch);
  const std::size_t pitch = bound.together ? 2 * part : part;
  EDGELLM_CUDA_TRY(
      cudaMemcpy2DAsync(slots, 2 * part, bound.keys[at], pitch, part, batch, cudaMemcpyDeviceToDevice, step.stream));
  EDGELLM_CUDA_TRY(cudaMemcpy2DAsync(slots + part, 2 * part, bound.values[at], pitch, part, batch,
                                     cudaMemcpyDeviceToDevice, step.stream));

  const float scale =
      config_.attention_scale > 0.0F ? config_.attention_scale : 1.0F / std::sqrt(static_cast<float>(config_.head_dim));
  if (bound.is_tree()) {
    const auto mask = std::find_if(bound.masks.begin(), bound.masks.end(),
                                   [&](const BoundMask& m) { return m.window == config_.window(index); });
    const auto which = bound.masks.empty() ? 0 : mask - bound.masks.begin();
    kernels::TreeAttentionArgs attention;
    attention.qkv = step.get<float>("qkv");
    attention.kv = kv;
    attention.rope = layer.rope;
    attention.starts = step.get<std::int32_t>("starts");
    attention.slots = step.get<std::int32_t>("sequence_slots");
    attention.positions = step.get<std::int32_t>("first_places");
    attention.depths = step.get<std::int32_t>("depths");
    attention.masks = step.get<std::uint64_t>("nodes") + which * step.num_tokens;
    attention.out = step.get<__nv_bfloat16>("attended");
    attention.num_sequences = bound.batch;
    attention.max_tokens = bound.length;
    attention.num_heads = config_.num_heads;
    attention.window = config_.window(index);
    attention.scale = scale;
    attention.workspace = step.get<std::byte>("tree_attention");
    kernels::tree_attention_async(attention, step.stream, false);
  } else if (bound.length == 1) {
    kernels::DecodeAttentionArgs attention;
    attention.qkv = step.get<float>("qkv");
    attention.kv = kv;
    attention.rope = layer.rope;
    attention.positions = step.get<std::int32_t>("places");
    attention.slots = step.get<std::int32_t>("slots");
    attention.out = step.get<__nv_bfloat16>("attended");
    attention.batch = bound.batch;
    attention.num_heads = config_.num_heads;
    attention.window = config_.window(index);
    attention.scale = scale;
    attention.most_splits = most_splits_;
    attention.most_attended = config_.capacity;
    attention.workspace = step.get<std::byte>("attention");
    kernels::decode_attention_async(attention, step.stream, false);
  } else {
    kernels::RopeKvWriteArgs rope;
    rope.qkv = step.get<float>("qkv");
    rope.qkv_is_f32 = true;
    rope.kv = kv;
    rope.rope = layer.rope;
    rope.slots = step.get<std::int32_t>("slots");
    rope.positions = step.get<std::int32_t>("places");
    rope.q_out = step.get<__nv_bfloat16>("q");
    rope.num_tokens = step.num_tokens;
    rope.num_heads = config_.num_heads;
    kernels::rope_kv_write_async(rope, step.stream, false);

    kernels::PrefillAttentionArgs attention;
    attention.q = step.get<__nv_bfloat16>("q");
    attention.kv = kv;
    attention.starts = step.get<std::int32_t>("starts");
    attention.slots = step.get<std::int32_t>("sequence_slots");
    attention.positions = step.get<std::int32_t>("first_places");
    attention.out = step.get<__nv_bfloat16>("attended");
    attention.num_sequences = bound.batch;
    attention.max_tokens = bound.length;
    attention.num_heads = config_.num_heads;
    attention.window = config_.window(index);
    attention.scale = scale;
    kernels::prefill_attention_async(attention, step.stream, false);
  }

  StoreArgs store;
  store.kv = kv;
  store.keys = bound.keys[at];
  store.values = bound.values[at];
  store.slot_elements = pitch / element_bytes(config_);
  store.write_indices = bound.write_indices;
  store.places = step.get<std::int32_t>("places");
  store.batch = bound.batch;
  store.length = bound.length;
  store_new_async(store, step.stream);
}

void Forward::linear_async(int index, Linear which, GemvArgs args, int out_width, const Step& step) const {
  const auto layer = static_cast<std::size_t>(index);
  const BoundLora lora =
      step.bound.loras.empty() ? BoundLora{} : step.bound.loras[layer][static_cast<std::size_t>(which)];
  if (lora.rank > 0) {
    PackLoraArgs pack;
    pack.bound_a = lora.a;
    pack.bound_b = lora.b;
    pack.is_bf16 = is_bf16_;
    pack.rank = lora.rank;
    pack.in = args.weight.cols;
    pack.out = args.weight.rows;
    pack.a = step.get<__nv_bfloat16>("lora.a");
    pack.b = step.get<__nv_bfloat16>("lora.b");
    pack.entry = step.get<kernels::LoraLinear>("lora.entry");
    pack_lora_async(pack, step.stream);
    args.lora = {pack.entry, step.get<std::int32_t>("ones"), step.get<float>("lora.h"),
                 kernels::padded_lora_rank(lora.rank)};
  }
  gemv_async(args, step.num_tokens, out_width, lora.rank > 0, step.stream);
}

// As many tokens at once as one kernel takes. out_width: a token's elements of the output.
void Forward::gemv_async(GemvArgs args, int num_tokens, int out_width, bool adapted, cudaStream_t stream) const {
  args.norm_eps = config_.rms_norm_eps;
  args.batch_invariant = config_.batch_invariant;
  for (int first = 0; first < num_tokens; first += kernels::kMaxGemvTokens) {
    args.num_tokens = std::min(kernels::kMaxGemvTokens, num_tokens - first);
    if (adapted) {
      kernels::LoraDownArgs down;
      down.lora = args.lora;
      down.x = args.x;
      down.gain = args.gain;
      down.norm_eps = args.norm_eps;
      down.num_tokens = args.num_tokens;
      down.cols = args.weight.cols;
      kernels::lora_down_async(down, stream, false);
    }
    kernels::gemv_async(args, stream, false);
    const auto count = static_cast<std::size_t>(kernels::kMaxGemvTokens);
    args.x += count * static_cast<std::size_t>(args.weight.cols);
    if (args.out_f32 != nullptr) args.out_f32 += count * static_cast<std::size_t>(out_width);
    if (args.out_bf16 != nullptr) args.out_bf16 += count * static_cast<std::size_t>(out_width);
  }
}

}  // namespace edgellm::nvinfer_double
