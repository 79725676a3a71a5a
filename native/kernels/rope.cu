// RoPE (half-split, as Hugging Face's rotate_half) for many tokens, with the optional head norms, and the KV write.
#include <cassert>

#include "edgellm/kernels/attention_prefill.hpp"
#include "kv_format.cuh"
#include "launch.hpp"

namespace edgellm::kernels {

namespace {

constexpr int kThreads = 256;

__device__ __forceinline__ float load_qkv(const RopeKvWriteArgs& p, std::size_t row, int column, int width) {
  const std::size_t at = row * width + column;
  const float v =
      p.qkv_is_f32 ? static_cast<const float*>(p.qkv)[at] : __bfloat162float(static_cast<const bf16*>(p.qkv)[at]);
  return p.bias ? v + p.bias[column] : v;
}

// A block a token, a warp a head.
template <KvFormat F>
__global__ void __launch_bounds__(kThreads, 4) rope_kv_write_kernel(const RopeKvWriteArgs p) {
  using Cache = Kv<F>;
  start_dependents();
  wait_for_predecessor();
  const int token = blockIdx.x, lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  const int position = *static_cast<const volatile int32_t*>(p.positions + token);
  const int slot = *static_cast<const volatile int32_t*>(p.slots + token);
  if (position < 0 || position >= p.kv.capacity) return;
  const int head_dim = p.kv.head_dim, half = head_dim / 2, num_kv = p.kv.num_kv_heads;
  const int num_rows = p.num_heads + 2 * num_kv, width = num_rows * head_dim;
  const std::size_t head_size = static_cast<std::size_t>(p.kv.capacity) * head_dim;
  typename Cache::Element* keys =
      static_cast<typename Cache::Element*>(p.kv.data) + static_cast<std::size_t>(slot) * 2 * num_kv * head_size;
  typename Cache::Element* values = keys + num_kv * head_size;
  for (int h = warp; h < num_rows; h += kThreads / 32) {
    const int kv_head = h < p.num_heads + num_kv ? h - p.num_heads : h - p.num_heads - num_kv;
    const std::size_t at = kv_head * head_size + static_cast<std::size_t>(position) * head_dim;  // of keys and values
    if (h >= p.num_heads + num_kv) {
      for (int i = lane; i < head_dim; i += 32) {
        values[at + i] = Cache::from_float(load_qkv(p, token, h * head_dim + i, width));
      }
      continue;
    }
    const bf16* gain = h < p.num_heads ? p.rope.q_gain : p.rope.k_gain;
    float low[2], high[2], squares = 0.0f;  // head_dim is at most 128: two pairs a lane
#pragma unroll
    for (int j = 0; j < 2; j++) {
      const int i = lane + 32 * j;
      low[j] = i < half ? load_qkv(p, token, h * head_dim + i, width) : 0.0f;
      high[j] = i < half ? load_qkv(p, token, h * head_dim + half + i, width) : 0.0f;
      squares = fmaf(low[j], low[j], fmaf(high[j], high[j], squares));
    }
    const float inverse = gain ? rsqrtf(warp_sum(squares) / static_cast<float>(head_dim) + p.rope.norm_eps) : 1.0f;
#pragma unroll
    for (int j = 0; j < 2; j++) {
      const int i = lane + 32 * j;
      if (i >= half) continue;
      if (gain) {
        low[j] *= inverse * __bfloat162float(gain[i]);
        high[j] *= inverse * __bfloat162float(gain[half + i]);
      }
      const float c = p.rope.cos[static_cast<std::size_t>(position) * half + i];
      const float s = p.rope.sin[static_cast<std::size_t>(position) * half + i];
      const float first = low[j] * c - high[j] * s, second = high[j] * c + low[j] * s;
      if (h < p.num_heads) {
        bf16* out = p.q_out + (static_cast<std::size_t>(token) * p.num_heads + h) * head_dim;
        out[i] = __float2bfloat16(first);
        out[half + i] = __float2bfloat16(second);
      } else {
        keys[at + i] = Cache::from_float(first);
        keys[at + half + i] = Cache::from_float(second);
      }
    }
  }
}

}  // namespace

void rope_kv_write_async(const RopeKvWriteArgs& args, cudaStream_t stream, bool pdl) {
  assert(args.kv.head_dim <= 128 && args.kv.head_dim % 2 == 0);
  const auto kernel =
      args.kv.format == KvFormat::fp8 ? rope_kv_write_kernel<KvFormat::fp8> : rope_kv_write_kernel<KvFormat::bf16>;
  launch(kernel, dim3(args.num_tokens), dim3(kThreads), 0, stream, pdl, args);
}

}  // namespace edgellm::kernels
