// What products of many tokens with int4 weights share, however a block divides them among its warps.
#pragma once

#include "copy_async.cuh"
#include "edgellm/kernels/gemm_int4.hpp"
#include "launch.hpp"

namespace edgellm::kernels {

constexpr int kBlock = 64;             // input features that are multiplied at a time
constexpr int kTileRows = 16;          // of a packed tile
constexpr int kTileBytes = 512;        // of a packed tile and kBlock features
constexpr int kRowBytes = kBlock * 2;  // of a token's x and kBlock features

struct GemmInt4Params {
  const uint8_t* data;    // (num_tiles, blocks of 64, 512), packed
  const uint8_t* scales;  // (num_tiles, num_groups, 32): fp16 of 16 rows
  const bf16* x;          // (num_tokens, cols)
  bf16* y;                // (num_tokens, rows), or null
  float* y_f32;           // else
  int rows;
  int cols;
  int num_tokens;
  int num_tiles;    // packed ones
  int num_groups;   // scales of a row, those of padding included
  int group_shift;  // blocks of 64 that share a scale, as a power of two
  bool gate_up;
  bool whole;  // eight rows of a packed tile are 16 aligned bytes of y
};

// Of kGemmInt4Tiles those with `split`, by their number there.
void load_gemm_int4_split(int group);
void launch_gemm_int4_split(const GemmInt4Params& p, int tile, int group, cudaStream_t stream, bool pdl);

__device__ __forceinline__ uint2 load_shared8(uint32_t from) {
  uint2 v;
  asm volatile("ld.shared.v2.u32 {%0,%1},[%2];" : "=r"(v.x), "=r"(v.y) : "r"(from) : "memory");
  return v;
}

// D = A B: the first product of a group.
__device__ __forceinline__ void first_mma_bf16(float* d, const uint32_t* a, uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%10,%10,%10,%10};"
      : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "f"(0.0f));
}

// A group's products of rows g, g, g + 8 and g + 8, scaled, to their sums; scale: of rows g and g + 8.
__device__ __forceinline__ void add_scaled(float* sums, float2 scale, const float* products) {
  sums[0] = fmaf(scale.x, products[0], sums[0]);
  sums[1] = fmaf(scale.x, products[1], sums[1]);
  sums[2] = fmaf(scale.y, products[2], sums[2]);
  sums[3] = fmaf(scale.y, products[3], sums[3]);
}

// Where piece 0 to 7, 16 bytes, of a token's row of x lies in it: pairs of pieces change places by the token's number,
// so that the four tokens that half a warp reads a pair of lie in different banks.
__device__ __forceinline__ int x_place(int piece, int token) { return piece ^ (token & 3) << 1; }

// To y the first or second eight rows of packed tile `packed`; of gate_up these are its gate rows or its up rows.
__device__ __forceinline__ void store_eight(const GemmInt4Params& p, int packed, int which, int token,
                                            const uint4& eight) {
  const int half = p.rows / 2;
  const int row = p.gate_up ? packed * 8 + which * half : packed * kTileRows + which * 8;
  const int count = min(8, p.gate_up ? half - packed * 8 : p.rows - row);
  bf16* to = p.y + static_cast<std::size_t>(token) * p.rows + row;
  if (count == 8 && p.whole) {
    *reinterpret_cast<uint4*>(to) = eight;
  } else {
    const bf16* from = reinterpret_cast<const bf16*>(&eight);
    for (int j = 0; j < count; j++) to[j] = from[j];
  }
}

}  // namespace edgellm::kernels
