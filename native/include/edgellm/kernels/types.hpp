// What the kernels' launch functions share: number formats, views of weights, and the KV cache's shape.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>

namespace edgellm::kernels {

// Every `*_async` launches on `stream` and never synchronises; all pointers are device memory. `pdl` launches with
// programmatic dependent launch, which starts the kernel while its predecessor on the stream still runs (compute
// capability 9.0 and newer; ignored elsewhere). It must be false for the first kernel after anything that is not a
// kernel (a copy, the start of a graph). After one of cuBLAS it may be true: that kernel was launched without it, so
// all before it is complete, and wait_for_predecessor waits for itself.

enum class WeightFormat : int {
  bf16 = 0,  // data (rows, cols)
  fp16 = 1,  // data (rows, cols)
  fp8 = 2,   // data E4M3 (rows, cols); scales float (rows)
  int8 = 3,  // data (rows, cols); scales fp16 (rows, cols / group)
  int4 = 4,  // repacked by repack_int4_async, both data and scales
  // What others' checkpoints have: an offset for each group, which is added to scale x data, and FP8 in blocks.
  int8_offset = 5,  // data (rows, cols); scales fp16 (rows, cols / group, 2): scale, offset
  fp8_blocks = 6,   // data E4M3 (rows, cols); scales float (rows, cols / group)
};

// A linear layer's weight on the device. Pointers are 16-byte aligned; cols is a multiple of 16.
struct WeightView {
  WeightFormat format = WeightFormat::bf16;
  const void* data = nullptr;
  const void* scales = nullptr;
  int rows = 0;   // output features
  int cols = 0;   // input features
  int group = 0;  // input features that share a scale: 16, 32, 64 or 128 (fp8_blocks: 64 or 128); else 0
};

// fp16 and fp8 (E4M3 without scales) saturate: a key or value beyond 65,504 or 448 becomes that.
enum class KvFormat : int { bf16 = 0, fp8 = 1, fp16 = 2 };

constexpr std::size_t kv_element_bytes(KvFormat format) { return format == KvFormat::fp8 ? 1 : 2; }

// Of the MLP's gate. gelu_tanh is GELU by its tanh approximation (https://arxiv.org/abs/1606.08415, section 2).
enum class Activation : int { silu = 0, gelu_tanh = 1 };

// One layer's part of the cache [layers, slots, 2, kv_heads, capacity, head_dim].
struct KvLayer {
  void* data = nullptr;  // (slots, 2, kv_heads, capacity, head_dim)
  KvFormat format = KvFormat::bf16;
  int num_kv_heads = 0;
  int capacity = 0;  // tokens a slot holds
  int head_dim = 0;  // 64, 80, 96, 128 or 256
};

// The factors that a product of E4M3 numbers left out: y[t, i] stands for y[t, i] * rows[t] * columns[i]. Both are null
// for a product that needs none.
struct ProductScales {
  const float* rows = nullptr;     // (num_tokens), of the activations
  const float* columns = nullptr;  // (out_features), of the weight's rows; 16-byte aligned
};

// Rotary tables and the optional RMSNorm of each query and key head (Qwen3, Gemma 3).
struct RopeTables {
  const float* cos = nullptr;             // (max_context, head_dim / 2)
  const float* sin = nullptr;             // (max_context, head_dim / 2)
  const __nv_bfloat16* q_gain = nullptr;  // (head_dim), or null: no norm
  const __nv_bfloat16* k_gain = nullptr;  // (head_dim), or null: no norm
  float norm_eps = 1e-6f;
};

}  // namespace edgellm::kernels
