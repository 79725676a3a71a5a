// Sixteen positions of one KV head in a warp's registers, as the operands of mma.m16n8k16 that they are multiplied in.
//
// A sum may take its terms in any order, so no lane needs its keys and values in the order of the instruction's
// description: each loads whole units of up to 16 bytes, and the other operand follows. With g = lane / 4, t = lane %
// 4:
// - Scores (16 x 8 positions) = queries (16 x dims) times keys (dims x 8 positions), twice. Rows 0 to 7 are the heads'
//   queries, rows 8 to 15 what rounding took from them. A lane has keys g and g + 8, of each a quarter of the dims.
// - Output (16 dims x 8 heads) = values (16 dims x 16 positions) times weights (16 positions x 8 heads). A lane has
//   values 2t, 2t + 1, 2t + 8 and 2t + 9, of each an eighth of the dims; byte permutes weave pairs of them together.
//   The weights are where the scores were.
#pragma once

#include <cstddef>

#include "kv_format.cuh"

namespace edgellm::kernels {

constexpr int kTilePositions = 16;
constexpr int kTileHeads = 8;

// Of the loads that a lane's `bytes` are read with.
constexpr int widest_unit(int bytes) { return bytes % 16 == 0 ? 16 : bytes % 8 == 0 ? 8 : bytes % 4 == 0 ? 4 : 2; }

// Read once by one SM: past L1. The rows of a head lie one behind the other, so L2 may fetch a neighbour at once.
template <int kBytes>
__device__ __forceinline__ void load_unit(uint32_t* to, const std::byte* from) {
  if constexpr (kBytes == 16) {
    asm volatile("ld.global.cg.L2::128B.v4.u32 {%0,%1,%2,%3},[%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "l"(from)
                 : "memory");
  } else if constexpr (kBytes == 8) {
    asm volatile("ld.global.cg.L2::128B.v2.u32 {%0,%1},[%2];" : "=r"(to[0]), "=r"(to[1]) : "l"(from) : "memory");
  } else if constexpr (kBytes == 4) {
    asm volatile("ld.global.cg.L2::128B.u32 %0,[%1];" : "=r"(to[0]) : "l"(from) : "memory");
  } else {
    uint16_t v;
    asm volatile("ld.global.cg.L2::128B.u16 %0,[%1];" : "=h"(v) : "l"(from) : "memory");
    to[0] = v;
  }
}

// The same from shared memory.
template <int kBytes>
__device__ __forceinline__ void copy_unit(uint32_t* to, const std::byte* from) {
  if constexpr (kBytes == 16) {
    const uint4 v = *reinterpret_cast<const uint4*>(from);
    to[0] = v.x, to[1] = v.y, to[2] = v.z, to[3] = v.w;
  } else if constexpr (kBytes == 8) {
    const uint2 v = *reinterpret_cast<const uint2*>(from);
    to[0] = v.x, to[1] = v.y;
  } else if constexpr (kBytes == 4) {
    to[0] = *reinterpret_cast<const uint32_t*>(from);
  } else {
    to[0] = *reinterpret_cast<const uint16_t*>(from);
  }
}

// D += A B in the tile's number format.
template <KvFormat F>
__device__ __forceinline__ void tile_mma(float* d, const uint32_t* a, uint32_t b0, uint32_t b1) {
  if constexpr (F == KvFormat::bf16) {
    mma_bf16(d, a, b0, b1);
  } else {
    mma_fp16(d, a, b0, b1);
  }
}
template <KvFormat F>
__device__ __forceinline__ uint32_t tile_pack(float low, float high) {
  return F == KvFormat::bf16 ? pack_bf16(low, high) : pack_fp16(low, high);
}

template <int HD, KvFormat F>
struct PositionTile {
  using Element = typename Kv<F>::Element;
  static constexpr int kElement = sizeof(Element);
  static constexpr int kRowBytes = HD * kElement;
  static constexpr int kSteps = HD / 16;  // of the dot products; and pairs of dims that a lane has of a value
  static constexpr int kKeyUnit = widest_unit(kRowBytes / 4), kKeyUnits = kRowBytes / 4 / kKeyUnit;
  static constexpr int kKeyWords = kRowBytes / 16;
  static constexpr int kValueUnit = widest_unit(kRowBytes / 8), kValueUnits = kRowBytes / 8 / kValueUnit;
  static constexpr int kUnitWords = kValueUnit < 4 ? 1 : kValueUnit / 4;
  static constexpr int kValueWords = kValueUnits * kUnitWords;
  static constexpr int kRegisters = 2 * kKeyWords + 4 * kValueWords;
  static constexpr float kUnscale = F == KvFormat::fp8 ? 1.0f / kFp8ToFp16 : 1.0f;  // of scores and outputs

  uint32_t key[2][kKeyWords];
  uint32_t value[4][kValueWords];

  // Whether the queries of a step wait in shared memory: beside a wide head's tile there are no registers for all.
  static constexpr bool kSharedQueries = HD > 128;

  // The first of the four dims that lane t multiplies in a step.
  static __device__ __forceinline__ int key_dim(int step, int t) {
    const int at = step * 4 * kElement;
    return (at / kKeyUnit * 4 + t) * (kKeyUnit / kElement) + at % kKeyUnit / kElement;
  }
  // The first of the two dims of a pair that lanes of this g have.
  static __device__ __forceinline__ int value_dim(int pair, int g) {
    const int at = pair * 2 * kElement;
    return (at / kValueUnit * 8 + g) * (kValueUnit / kElement) + at % kValueUnit / kElement;
  }
  static __device__ __forceinline__ int value_row(int i, int t) { return 2 * t + (i & 1) + 8 * (i >> 1); }

  // Rows base to base + 15 of a head's keys, or of its values; `last` stands for those behind it.
  __device__ __forceinline__ void load_keys(const std::byte* keys, int base, int last, int lane) {
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const int row = min(base + (lane >> 2) + 8 * half, last);
      const std::byte* from = keys + static_cast<std::size_t>(row) * kRowBytes + (lane & 3) * kKeyUnit;
#pragma unroll
      for (int u = 0; u < kKeyUnits; u++) {
        load_unit<kKeyUnit>(&key[half][u * (kKeyUnit / 4)], from + u * 4 * kKeyUnit);
      }
    }
  }
  __device__ __forceinline__ void load_values(const std::byte* values, int base, int last, int lane) {
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const int row = min(base + value_row(i, lane & 3), last);
      const std::byte* from = values + static_cast<std::size_t>(row) * kRowBytes + (lane >> 2) * kValueUnit;
#pragma unroll
      for (int u = 0; u < kValueUnits; u++) {
        load_unit<kValueUnit>(&value[i][u * kUnitWords], from + u * 8 * kValueUnit);
      }
    }
  }

  // Puts a key and value from shared memory into `row` of the tile. Values behind it become zeros: they are not loaded
  // when nothing is before it, and a weight of zero does not silence a NaN.
  __device__ __forceinline__ void insert(const Element* new_key, const Element* new_value, int row, int lane) {
#pragma unroll
    for (int half = 0; half < 2; half++) {
      if ((lane >> 2) + 8 * half != row) continue;
      const std::byte* from = reinterpret_cast<const std::byte*>(new_key) + (lane & 3) * kKeyUnit;
#pragma unroll
      for (int u = 0; u < kKeyUnits; u++) {
        copy_unit<kKeyUnit>(&key[half][u * (kKeyUnit / 4)], from + u * 4 * kKeyUnit);
      }
    }
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const int own = value_row(i, lane & 3);
      const std::byte* from = reinterpret_cast<const std::byte*>(new_value) + (lane >> 2) * kValueUnit;
#pragma unroll
      for (int u = 0; u < kValueUnits; u++) {
        if (own == row) copy_unit<kValueUnit>(&value[i][u * kUnitWords], from + u * 8 * kValueUnit);
      }
#pragma unroll
      for (int w = 0; w < kValueWords; w++) value[i][w] = own > row ? 0u : value[i][w];
    }
  }

  // Scores of head g with positions 2t, 2t + 1, 2t + 8 and 2t + 9. queries[step]: of dims key_dim to + 1 the rounded
  // query of head g and the rest, then the same of the next two dims. Short chains of sums: their products do not wait
  // for one another.
  __device__ __forceinline__ void score(const uint32_t (&queries)[kSteps][4], float (&scores)[4]) const {
#pragma unroll
    for (int half = 0; half < 2; half++) {
      float sums[2][4] = {};
#pragma unroll
      for (int s = 0; s < kSteps; s++) {
        if constexpr (F == KvFormat::fp8) {
          tile_mma<F>(sums[s & 1], queries[s], fp8x2_to_fp16x2(key[half][s]), fp8x2_to_fp16x2(key[half][s] >> 16));
        } else {
          tile_mma<F>(sums[s & 1], queries[s], key[half][2 * s], key[half][2 * s + 1]);
        }
      }
#pragma unroll
      for (int i = 0; i < 2; i++) {
        scores[2 * half + i] = ((sums[0][i] + sums[1][i]) + (sums[0][i + 2] + sums[1][i + 2])) * kUnscale;
      }
    }
  }

  // The same with queries from shared memory: `rounded` and `rest` are head g's rows, of which a lane reads two steps
  // at a time, each once for both halves of the tile.
  __device__ __forceinline__ void score(const uint16_t* rounded, const uint16_t* rest, int t,
                                        float (&scores)[4]) const {
    static_assert(!kSharedQueries || kKeyUnit == 16);  // two steps' dims lie side by side
    float sums[2][2][4] = {};                          // half, chain
#pragma unroll
    for (int s = 0; s < kSteps; s += 2) {
      const uint4 a = *reinterpret_cast<const uint4*>(rounded + key_dim(s, t));
      const uint4 b = *reinterpret_cast<const uint4*>(rest + key_dim(s, t));
      const uint32_t queries[2][4] = {{a.x, b.x, a.y, b.y}, {a.z, b.z, a.w, b.w}};
#pragma unroll
      for (int i = 0; i < 2; i++) {
#pragma unroll
        for (int half = 0; half < 2; half++) {
          const int step = s + i;
          if constexpr (F == KvFormat::fp8) {
            const uint32_t word = key[half][step];
            tile_mma<F>(sums[half][i], queries[i], fp8x2_to_fp16x2(word), fp8x2_to_fp16x2(word >> 16));
          } else {
            tile_mma<F>(sums[half][i], queries[i], key[half][2 * step], key[half][2 * step + 1]);
          }
        }
      }
    }
#pragma unroll
    for (int half = 0; half < 2; half++) {
#pragma unroll
      for (int i = 0; i < 2; i++) {
        scores[2 * half + i] =
            ((sums[half][0][i] + sums[half][1][i]) + (sums[half][0][i + 2] + sums[half][1][i + 2])) * kUnscale;
      }
    }
  }

  // out[pair][0], [1]: the pair's first dim of heads 2t, 2t + 1; [2], [3]: its second. b0 and b1 have the weights of
  // positions 2t, 2t + 1 and 2t + 8, 2t + 9 for head g.
  __device__ __forceinline__ void accumulate(uint32_t b0, uint32_t b1, float (&out)[kSteps][4]) const {
#pragma unroll
    for (int pair = 0; pair < kSteps; pair++) {
      uint32_t a[4];
#pragma unroll
      for (int i = 0; i < 4; i += 2) {
        if constexpr (F == KvFormat::fp8) {
          const int word = kValueUnit < 4 ? pair : pair / 2;
          const bool upper = kValueUnit >= 4 && (pair & 1);
          const uint32_t both = __byte_perm(value[i][word], value[i + 1][word], upper ? 0x7362 : 0x5140);
          a[i] = fp8x2_to_fp16x2(both), a[i + 1] = fp8x2_to_fp16x2(both >> 16);
        } else {
          a[i] = __byte_perm(value[i][pair], value[i + 1][pair], 0x5410);
          a[i + 1] = __byte_perm(value[i][pair], value[i + 1][pair], 0x7632);
        }
      }
      tile_mma<F>(out[pair], a, b0, b1);
    }
  }
};

}  // namespace edgellm::kernels
