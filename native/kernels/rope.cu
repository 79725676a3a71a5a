// RoPE (half-split, as Hugging Face's rotate_half) for many tokens, with the optional head norms, and the KV write.
#include <cassert>

#include "edgellm/kernels/rope.hpp"
#include "kv_format.cuh"
#include "launch.hpp"

namespace edgellm::kernels {

namespace {

constexpr int kThreads = 256;

// Eight neighbouring elements of qkv as they lie in memory: two are loaded before the first is looked at.
template <bool kF32>
struct Eight {
  uint4 words[kF32 ? 2 : 1];
};

template <bool kF32>
__device__ __forceinline__ Eight<kF32> load_eight(const void* qkv, std::size_t at) {
  Eight<kF32> eight;
  if constexpr (kF32) {
    eight.words[0] = load_activation(static_cast<const float*>(qkv) + at);
    eight.words[1] = load_activation(static_cast<const float*>(qkv) + at + 4);
  } else {
    eight.words[0] = load_activation(static_cast<const bf16*>(qkv) + at);
  }
  return eight;
}

// As they are before RoPE; `column` is the first one's.
template <bool kF32>
__device__ __forceinline__ void unpack_eight(const RopeKvWriteArgs& p, const Eight<kF32>& eight, int column,
                                             float row_scale, float* v) {
  if constexpr (kF32) {
#pragma unroll
    for (int i = 0; i < 2; i++) {
      const float4 four = bits_as<float4>(eight.words[i]);
      v[4 * i] = four.x, v[4 * i + 1] = four.y, v[4 * i + 2] = four.z, v[4 * i + 3] = four.w;
    }
  } else {
    unpack_bf16(eight.words[0], v);
  }
  float more[8];
  if (p.scales.columns) {
    load_eight_constants(p.scales.columns + column, more);
#pragma unroll
    for (int i = 0; i < 8; i++) v[i] *= row_scale * more[i];
  }
  if (p.bias) {
    load_eight_constants(p.bias + column, more);
#pragma unroll
    for (int i = 0; i < 8; i++) v[i] += more[i];
  }
}

// kLanes threads a head, of which each holds eight dims of the lower half and the eight that they rotate with.
template <KvFormat F, bool kF32, int kLanes>
__global__ void __launch_bounds__(kThreads, 5) rope_kv_write_kernel(const RopeKvWriteArgs p) {
  using Cache = Kv<F>;
  start_dependents();
  wait_for_predecessor();
  const int head_dim = p.kv.head_dim, half = head_dim / 2, num_kv = p.kv.num_kv_heads;
  const int num_rows = p.num_heads + 2 * num_kv, width = num_rows * head_dim;
  const unsigned index = blockIdx.x * (kThreads / kLanes) + threadIdx.x / kLanes;  // of (token, head)
  const bool inside = index < static_cast<unsigned>(p.num_tokens) * static_cast<unsigned>(num_rows);
  const int token = inside ? static_cast<int>(index / static_cast<unsigned>(num_rows)) : 0;
  const int h = inside ? static_cast<int>(index % static_cast<unsigned>(num_rows)) : 0;
  const int i = static_cast<int>(threadIdx.x % kLanes) * 8;  // first dim
  const int position = *static_cast<const volatile int32_t*>(p.positions + token);
  const int slot = *static_cast<const volatile int32_t*>(p.slots + token);
  // No return before the shuffles; and what is loaded does not wait for the position.
  const float row_scale = p.scales.rows ? __ldcg(p.scales.rows + token) : 1.0f;
  float low[8] = {}, high[8] = {};
  if (inside && i < half) {
    const int column = h * head_dim + i;
    const std::size_t at = static_cast<std::size_t>(token) * width + column;
    const Eight<kF32> low_words = load_eight<kF32>(p.qkv, at), high_words = load_eight<kF32>(p.qkv, at + half);
    unpack_eight<kF32>(p, low_words, column, row_scale, low);
    unpack_eight<kF32>(p, high_words, column + half, row_scale, high);
  }
  const bool active = inside && i < half && position >= 0 && position < p.kv.capacity;
  const bool is_value = h >= p.num_heads + num_kv;
  const bf16* gain = is_value ? nullptr : h < p.num_heads ? p.rope.q_gain : p.rope.k_gain;
  if (p.rope.q_gain || p.rope.k_gain) {
    float squares = 0.0f;
#pragma unroll
    for (int j = 0; j < 8; j++) squares = fmaf(low[j], low[j], fmaf(high[j], high[j], squares));
#pragma unroll
    for (int s = kLanes / 2; s >= 1; s >>= 1) squares += __shfl_xor_sync(kAllLanes, squares, s);
    if (gain && active) {
      const float inverse = rsqrtf(squares / static_cast<float>(head_dim) + p.rope.norm_eps);
      float gains[8];
      unpack_bf16(load_constant(gain + i), gains);
#pragma unroll
      for (int j = 0; j < 8; j++) low[j] *= inverse * gains[j];
      unpack_bf16(load_constant(gain + half + i), gains);
#pragma unroll
      for (int j = 0; j < 8; j++) high[j] *= inverse * gains[j];
    }
  }
  if (!active) return;
  if (!is_value) {
    const std::size_t table = static_cast<std::size_t>(position) * half + i;
#pragma unroll
    for (int j = 0; j < 8; j += 4) {
      const float4 c = bits_as<float4>(load_constant(p.rope.cos + table + j));
      const float4 s = bits_as<float4>(load_constant(p.rope.sin + table + j));
      const float cos[4] = {c.x, c.y, c.z, c.w}, sin[4] = {s.x, s.y, s.z, s.w};
#pragma unroll
      for (int k = 0; k < 4; k++) {
        const float first = low[j + k] * cos[k] - high[j + k] * sin[k];
        high[j + k] = high[j + k] * cos[k] + low[j + k] * sin[k];
        low[j + k] = first;
      }
    }
  }
  if (h < p.num_heads) {
    bf16* out = p.q_out + (static_cast<std::size_t>(token) * p.num_heads + h) * head_dim + i;
    store_whole(out, Kv<KvFormat::bf16>::pack(low));
    store_whole(out + half, Kv<KvFormat::bf16>::pack(high));
    return;
  }
  const std::size_t head_size = static_cast<std::size_t>(p.kv.capacity) * head_dim;
  // A slot's keys of all heads, then its values of all heads.
  typename Cache::Element* to = static_cast<typename Cache::Element*>(p.kv.data) +
                                (static_cast<std::size_t>(slot) * 2 * num_kv + (h - p.num_heads)) * head_size +
                                static_cast<std::size_t>(position) * head_dim + i;
  store_whole(to, Cache::pack(low));
  store_whole(to + half, Cache::pack(high));
}

template <KvFormat F, bool kF32>
void launch_rope(const RopeKvWriteArgs& args, cudaStream_t stream, bool pdl) {
  const int num_rows = args.num_heads + 2 * args.kv.num_kv_heads;
  const auto run = [&](auto kernel, int lanes) {
    const auto per_block = static_cast<unsigned>(kThreads / lanes);
    const unsigned count = static_cast<unsigned>(args.num_tokens) * static_cast<unsigned>(num_rows);
    launch(kernel, dim3((count + per_block - 1) / per_block), dim3(kThreads), 0, stream, pdl, args);
  };
  if (args.kv.head_dim <= 64) return run(rope_kv_write_kernel<F, kF32, 4>, 4);
  if (args.kv.head_dim <= 128) return run(rope_kv_write_kernel<F, kF32, 8>, 8);
  run(rope_kv_write_kernel<F, kF32, 16>, 16);
}

template <KvFormat F>
void launch_input(const RopeKvWriteArgs& args, cudaStream_t stream, bool pdl) {
  if (args.qkv_is_f32) return launch_rope<F, true>(args, stream, pdl);
  launch_rope<F, false>(args, stream, pdl);
}

}  // namespace

void rope_kv_write_async(const RopeKvWriteArgs& args, cudaStream_t stream, bool pdl) {
  assert(args.kv.head_dim <= 256 && args.kv.head_dim % 16 == 0);
  if (args.kv.format == KvFormat::fp8) return launch_input<KvFormat::fp8>(args, stream, pdl);
  if (args.kv.format == KvFormat::fp16) return launch_input<KvFormat::fp16>(args, stream, pdl);
  launch_input<KvFormat::bf16>(args, stream, pdl);
}

}  // namespace edgellm::kernels
