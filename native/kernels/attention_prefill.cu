// Prefill attention: FlashAttention-2 (Dao 2023) over a slot of the cache, on mma.m16n8k16.
//
// A block has one KV head and 64 rows; a row is a (token, query head of the group) pair, so that grouped queries share
// the keys and values they read, and a few tokens of a large group fill the tensor cores too. Four warps have 16 rows
// each and run over tiles of 64 positions, fetched one tile ahead.
#include <cassert>
#include <cmath>
#include <stdexcept>
#include <string>

#include "edgellm/kernels/attention_prefill.hpp"
#include "kv_format.cuh"
#include "launch.hpp"

namespace edgellm::kernels {

namespace {

constexpr int kWarps = 4;
constexpr int kThreads = kWarps * 32;
constexpr int kRows = kWarps * 16;
constexpr int kTile = 64;  // positions

struct Params {
  const bf16* q;
  const void* cache;
  const int32_t* starts;
  const int32_t* slots;
  const int32_t* positions;
  bf16* out;
  int num_heads;
  int num_kv_heads;
  int capacity;
  int window;
  float scale;  // times log2(e)
};

__device__ __forceinline__ void copy_16_async(void* shared, const void* global, bool inside) {
  const uint32_t to = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  const int bytes = inside ? 16 : 0;  // the rest is zeros
  asm volatile("cp.async.cg.shared.global [%0],[%1],16,%2;" ::"r"(to), "l"(global), "r"(bytes) : "memory");
}
__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
__device__ __forceinline__ void wait_for_copies() { asm volatile("cp.async.wait_group 0;" ::: "memory"); }

__device__ __forceinline__ void load_matrices(uint32_t* r, const bf16* p) {
  const uint32_t from = static_cast<uint32_t>(__cvta_generic_to_shared(p));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3},[%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(from)
               : "memory");
}
__device__ __forceinline__ void load_matrices_transposed(uint32_t* r, const bf16* p) {
  const uint32_t from = static_cast<uint32_t>(__cvta_generic_to_shared(p));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3},[%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(from)
               : "memory");
}

template <int HD>
constexpr int kStride = HD + 8;  // elements a row in shared memory: ldmatrix without bank conflicts
template <int HD>
constexpr int kStageElements = 2 * kTile * kStride<HD>;  // keys, then values
template <int HD>
constexpr std::size_t kSharedBytes = 2 * kStageElements<HD> * sizeof(bf16);

// Positions tile to tile + 63 of keys and values into one stage; those from `end` on are zeros.
template <int HD, KvFormat F>
__device__ __forceinline__ void fetch_tile(bf16* stage, const typename Kv<F>::Element* keys,
                                           const typename Kv<F>::Element* values, int tile, int end) {
  constexpr int kChunks = HD / 8;
  static_assert(kTile * kChunks % kThreads == 0);
#pragma unroll
  for (int i = 0; i < kTile * kChunks / kThreads; i++) {
    const int index = i * kThreads + threadIdx.x, row = index / kChunks, column = index % kChunks * 8;
    const bool inside = tile + row < end;
    const std::size_t at = static_cast<std::size_t>(inside ? tile + row : 0) * HD + column;
    bf16* key = stage + row * kStride<HD> + column;
    bf16* value = key + kTile * kStride<HD>;
    if constexpr (F != KvFormat::fp8) {
      copy_16_async(key, keys + at, inside);
      copy_16_async(value, values + at, inside);
    } else {
      float ks[8], vs[8];
      Kv<F>::unpack(inside ? Kv<F>::load(keys + at) : Kv<F>::zeros(), ks);
      Kv<F>::unpack(inside ? Kv<F>::load(values + at) : Kv<F>::zeros(), vs);
      *reinterpret_cast<uint4*>(key) = make_uint4(pack_bf16(ks[0], ks[1]), pack_bf16(ks[2], ks[3]),
                                                  pack_bf16(ks[4], ks[5]), pack_bf16(ks[6], ks[7]));
      *reinterpret_cast<uint4*>(value) = make_uint4(pack_bf16(vs[0], vs[1]), pack_bf16(vs[2], vs[3]),
                                                    pack_bf16(vs[4], vs[5]), pack_bf16(vs[6], vs[7]));
    }
  }
  commit_copies();
}

// The products' operands: as the cache has them, and bf16 for FP8.
template <KvFormat F>
__device__ __forceinline__ void operand_mma(float* d, const uint32_t* a, uint32_t b0, uint32_t b1) {
  if constexpr (F == KvFormat::fp16) {
    mma_fp16(d, a, b0, b1);
  } else {
    mma_bf16(d, a, b0, b1);
  }
}
template <KvFormat F>
__device__ __forceinline__ uint32_t operand_pack(float low, float high) {
  return F == KvFormat::fp16 ? pack_fp16(low, high) : pack_bf16(low, high);
}
template <KvFormat F>
__device__ __forceinline__ uint32_t operand_from_bf16(uint32_t two) {
  if constexpr (F != KvFormat::fp16) return two;
  using Half = Kv<KvFormat::fp16>;
  return bits_as<uint32_t>(__halves2half2(Half::from_float(low_float(two)), Half::from_float(high_float(two))));
}

template <int HD, KvFormat F>
__global__ void __launch_bounds__(kThreads, 2) prefill_attention_kernel(const Params p) {
  using Element = typename Kv<F>::Element;
  constexpr int kSteps = HD / 16;    // of the dot products
  constexpr int kOutTiles = HD / 8;  // of the output's dims
  constexpr int kScoreTiles = kTile / 8;
  extern __shared__ uint4 shared_memory[];
  bf16* stages = reinterpret_cast<bf16*>(shared_memory);
  start_dependents();
  wait_for_predecessor();

  const int sequence = blockIdx.z, kv_head = blockIdx.y, lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  const int g = lane >> 2, t = lane & 3;
  const int group = p.num_heads / p.num_kv_heads;
  const int first_token = p.starts[sequence], num_tokens = p.starts[sequence + 1] - first_token;
  // Late rows have the longest way: they go first.
  const int first_row = static_cast<int>(gridDim.x - 1 - blockIdx.x) * kRows;
  if (first_row >= num_tokens * group) return;
  const int base = p.positions[sequence];
  const int lowest = base + first_row / group;  // positions of the block's first and last token
  const int highest = base + min((first_row + kRows - 1) / group, num_tokens - 1);
  const std::size_t head_size = static_cast<std::size_t>(p.capacity) * HD;
  const Element* keys = static_cast<const Element*>(p.cache) +
                        (static_cast<std::size_t>(p.slots[sequence]) * 2 * p.num_kv_heads + kv_head) * head_size;
  const Element* values = keys + p.num_kv_heads * head_size;

  int position[2];        // of rows g and g + 8
  std::size_t offset[2];  // of their q and out
  bool valid[2];
#pragma unroll
  for (int i = 0; i < 2; i++) {
    const int row = first_row + warp * 16 + g + 8 * i, token = min(row / group, num_tokens - 1);
    valid[i] = row < num_tokens * group;
    position[i] = base + token;
    offset[i] = (static_cast<std::size_t>(first_token + token) * p.num_heads + kv_head * group + row % group) * HD;
  }
  const int end = highest + 1;
  const int begin = p.window > 0 ? max(0, lowest - p.window + 1) / kTile * kTile : 0;
  fetch_tile<HD, F>(stages, keys, values, begin, end);

  uint32_t q[kSteps][4];
#pragma unroll
  for (int s = 0; s < kSteps; s++) {
#pragma unroll
    for (int j = 0; j < 4; j++) {
      const bf16* from = p.q + offset[j & 1] + s * 16 + 2 * t + 8 * (j >> 1);
      q[s][j] = operand_from_bf16<F>(*reinterpret_cast<const uint32_t*>(from));
    }
  }
  float out[kOutTiles][4] = {};
  float top[2] = {-1e30f, -1e30f}, total[2] = {};  // finite, so that a row without scores yet gives no NaN

  int stage = 0;
  for (int tile = begin; tile < end; tile += kTile, stage ^= 1) {
    wait_for_copies();
    __syncthreads();  // the tile is there, and all warps are done with the other stage
    if (tile + kTile < end) {
      fetch_tile<HD, F>(stages + (stage ^ 1) * kStageElements<HD>, keys, values, tile + kTile, end);
    }
    const bf16* key_tile = stages + stage * kStageElements<HD>;
    const bf16* value_tile = key_tile + kTile * kStride<HD>;

    float scores[kScoreTiles][4] = {};
#pragma unroll
    for (int s = 0; s < kSteps; s++) {
#pragma unroll
      for (int n = 0; n < kScoreTiles; n += 2) {
        uint32_t b[4];
        load_matrices(b,
                      key_tile + (n * 8 + (lane >> 4) * 8 + (lane & 7)) * kStride<HD> + s * 16 + ((lane >> 3) & 1) * 8);
        operand_mma<F>(scores[n], q[s], b[0], b[1]);
        operand_mma<F>(scores[n + 1], q[s], b[2], b[3]);
      }
    }
    const bool masked = tile + kTile - 1 > lowest || (p.window > 0 && tile <= highest - p.window);
    float higher[2] = {top[0], top[1]};
#pragma unroll
    for (int n = 0; n < kScoreTiles; n++) {
#pragma unroll
      for (int i = 0; i < 4; i++) {
        float score = scores[n][i] * p.scale;
        if (masked) {
          const int at = tile + n * 8 + 2 * t + (i & 1), own = position[i >> 1];
          if (at > own || (p.window > 0 && at <= own - p.window)) score = -INFINITY;
        }
        scores[n][i] = score;
        higher[i >> 1] = fmaxf(higher[i >> 1], score);
      }
    }
    float shrink[2];
#pragma unroll
    for (int i = 0; i < 2; i++) {
      higher[i] = fmaxf(higher[i], __shfl_xor_sync(kAllLanes, higher[i], 1));
      higher[i] = fmaxf(higher[i], __shfl_xor_sync(kAllLanes, higher[i], 2));
      shrink[i] = exp2f(top[i] - higher[i]);
      top[i] = higher[i];
      total[i] *= shrink[i];
    }
#pragma unroll
    for (int n = 0; n < kScoreTiles; n++) {
#pragma unroll
      for (int i = 0; i < 4; i++) {
        scores[n][i] = exp2f(scores[n][i] - top[i >> 1]);
        total[i >> 1] += scores[n][i];
      }
    }
#pragma unroll
    for (int d = 0; d < kOutTiles; d++) {
#pragma unroll
      for (int i = 0; i < 4; i++) out[d][i] *= shrink[i >> 1];
    }
#pragma unroll
    for (int s = 0; s < kTile / 16; s++) {
      const uint32_t a[4] = {operand_pack<F>(scores[2 * s][0], scores[2 * s][1]),
                             operand_pack<F>(scores[2 * s][2], scores[2 * s][3]),
                             operand_pack<F>(scores[2 * s + 1][0], scores[2 * s + 1][1]),
                             operand_pack<F>(scores[2 * s + 1][2], scores[2 * s + 1][3])};
#pragma unroll
      for (int d = 0; d < kOutTiles; d += 2) {
        uint32_t b[4];
        load_matrices_transposed(
            b, value_tile + (s * 16 + ((lane >> 3) & 1) * 8 + (lane & 7)) * kStride<HD> + d * 8 + (lane >> 4) * 8);
        operand_mma<F>(out[d], a, b[0], b[1]);
        operand_mma<F>(out[d + 1], a, b[2], b[3]);
      }
    }
  }

#pragma unroll
  for (int i = 0; i < 2; i++) {
    total[i] += __shfl_xor_sync(kAllLanes, total[i], 1);
    total[i] += __shfl_xor_sync(kAllLanes, total[i], 2);
    if (!valid[i]) continue;
    const float inverse = 1.0f / total[i];
#pragma unroll
    for (int d = 0; d < kOutTiles; d++) {
      *reinterpret_cast<uint32_t*>(p.out + offset[i] + d * 8 + 2 * t) =
          pack_bf16(out[d][2 * i] * inverse, out[d][2 * i + 1] * inverse);
    }
  }
}

template <int HD, KvFormat F>
void launch_prefill(const PrefillAttentionArgs& args, const Params& p, cudaStream_t stream, bool pdl) {
  const auto kernel = prefill_attention_kernel<HD, F>;
  EDGELLM_CUDA_TRY(
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(kSharedBytes<HD>)));
  const int group = args.num_heads / args.kv.num_kv_heads;
  launch(kernel, dim3(ceil_div(args.max_tokens * group, kRows), args.kv.num_kv_heads, args.num_sequences),
         dim3(kThreads), kSharedBytes<HD>, stream, pdl, p);
}

template <int HD>
void launch_format(const PrefillAttentionArgs& args, const Params& p, cudaStream_t stream, bool pdl) {
  if (args.kv.format == KvFormat::fp8) return launch_prefill<HD, KvFormat::fp8>(args, p, stream, pdl);
  if (args.kv.format == KvFormat::fp16) return launch_prefill<HD, KvFormat::fp16>(args, p, stream, pdl);
  launch_prefill<HD, KvFormat::bf16>(args, p, stream, pdl);
}

}  // namespace

void prefill_attention_async(const PrefillAttentionArgs& args, cudaStream_t stream, bool pdl) {
  assert(args.num_heads % args.kv.num_kv_heads == 0);
  const Params p = {args.q,
                    args.kv.data,
                    args.starts,
                    args.slots,
                    args.positions,
                    args.out,
                    args.num_heads,
                    args.kv.num_kv_heads,
                    args.kv.capacity,
                    args.window,
                    args.scale * 1.4426950408889634f};
  switch (args.kv.head_dim) {
    case 64:
      return launch_format<64>(args, p, stream, pdl);
    case 80:
      return launch_format<80>(args, p, stream, pdl);
    case 96:
      return launch_format<96>(args, p, stream, pdl);
    case 128:
      return launch_format<128>(args, p, stream, pdl);
    default:
      throw std::invalid_argument("head_dim " + std::to_string(args.kv.head_dim) +
                                  " has no attention kernel; there are 64, 80, 96 and 128");
  }
}

}  // namespace edgellm::kernels
