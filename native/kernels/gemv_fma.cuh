// One token, any format but int4: each weight goes from memory to a register to a multiply-add, once.
//
// A block has R whole rows. A thread holds C chunks of 16 bytes of each of them in registers, all loads in flight at
// once and most of them issued before the predecessor kernel has finished. The memory system sees many short-lived
// blocks, whose freed places the next kernel's blocks fill.
#pragma once

#include "gemv_common.cuh"
#include "launch.hpp"

namespace edgellm::kernels {

template <WeightFormat F>
constexpr int kChunk = F == WeightFormat::bf16 || F == WeightFormat::fp16 ? 8 : 16;  // weights in 16 bytes

template <WeightFormat F>
__device__ __forceinline__ void unpack_weights(const uint4& v, float* out) {  // out[kChunk<F>]
  const uint32_t words[4] = {v.x, v.y, v.z, v.w};
  if constexpr (F == WeightFormat::bf16) {
    unpack_bf16(v, out);
  } else if constexpr (F == WeightFormat::fp16) {
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const float2 two = unpack_fp16(words[i]);
      out[2 * i] = two.x, out[2 * i + 1] = two.y;
    }
  } else if constexpr (F == WeightFormat::fp8 || F == WeightFormat::fp8_blocks) {
#pragma unroll
    for (int i = 0; i < 8; i++) {
      const float2 two = unpack_fp16(fp8x2_to_fp16x2(words[i / 2] >> (16 * (i & 1))));
      out[2 * i] = two.x, out[2 * i + 1] = two.y;
    }
  } else {
    // 0x4b0000uu is 2^23 + uu as a float; uu is the weight + 128. Exact, and faster than integer conversions.
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const uint32_t biased = words[i] ^ 0x80808080u;
      out[4 * i] = __uint_as_float(__byte_perm(biased, 0x4b000000u, 0x7650)) - 8388736.0f;
      out[4 * i + 1] = __uint_as_float(__byte_perm(biased, 0x4b000000u, 0x7651)) - 8388736.0f;
      out[4 * i + 2] = __uint_as_float(__byte_perm(biased, 0x4b000000u, 0x7652)) - 8388736.0f;
      out[4 * i + 3] = __uint_as_float(__byte_perm(biased, 0x4b000000u, 0x7653)) - 8388736.0f;
    }
  }
}

// What a group of weights has, and none: a scale; a scale and an offset.
template <WeightFormat F>
__device__ __forceinline__ auto no_scale() {
  if constexpr (F == WeightFormat::int8_offset) {
    return bits_as<__half2>(0u);
  } else if constexpr (F == WeightFormat::fp8_blocks) {
    return 0.0f;
  } else {
    return __ushort_as_half(0);
  }
}
template <WeightFormat F>
using GroupScale = decltype(no_scale<F>());

// What the kernels for one and for several tokens share, so that both give a token the same bits: a thread's chunks
// are c * blockDim.x + threadIdx.x, summed in the order of c; then lanes by halves, then warps in their order.
template <WeightFormat F, int C, int R>
struct WeightRows {
  static constexpr bool has_groups =
      F == WeightFormat::int8 || F == WeightFormat::int8_offset || F == WeightFormat::fp8_blocks;
  uint4 w[R][C];
  GroupScale<F> scale[has_groups ? R : 1][has_groups ? C : 1];

  __device__ __forceinline__ void load(const GemvParams& p, int chunks) {
    const uint4* weights = static_cast<const uint4*>(p.data);
#pragma unroll
    for (int r = 0; r < R; r++) {
      const std::size_t row = block_row<R>(p, blockIdx.x, r);
#pragma unroll
      for (int c = 0; c < C; c++) {
        const int chunk = c * blockDim.x + threadIdx.x;
        w[r][c] = chunk < chunks ? load_once(weights + row * chunks + chunk) : make_uint4(0, 0, 0, 0);
      }
    }
    if constexpr (has_groups) {
      const int num_groups = p.cols >> p.group_shift;
      constexpr int kVecShift = 4;  // 16 weights a chunk
#pragma unroll
      for (int c = 0; c < C; c++) {
        const int chunk = c * blockDim.x + threadIdx.x;
        const int group = chunk >> (p.group_shift - kVecShift);
#pragma unroll
        for (int r = 0; r < R; r++) {
          const std::size_t row = block_row<R>(p, blockIdx.x, r);
          scale[r][c] = chunk < chunks ? __ldg(static_cast<const GroupScale<F>*>(p.scales) + row * num_groups + group)
                                       : no_scale<F>();
        }
      }
    }
  }
};

// A thread's chunks of x or of the gain, 16 bytes a load.
template <int C, int kXLoads, bool kConstant>
__device__ __forceinline__ void load_chunks(const bf16* source, int chunks, uint4* out) {
#pragma unroll
  for (int c = 0; c < C; c++) {
    const int chunk = c * blockDim.x + threadIdx.x;
#pragma unroll
    for (int v = 0; v < kXLoads; v++) {
      const bf16* at = source + chunk * (8 * kXLoads) + v * 8;
      out[c * kXLoads + v] =
          chunk < chunks ? (kConstant ? load_constant(at) : load_activation(at)) : make_uint4(0, 0, 0, 0);
    }
  }
}

// A thread's chunks of x in fp32, which go with eight weights in 16 bits each.
template <int C>
__device__ __forceinline__ void load_wide_chunks(const float* source, int chunks, uint4* out) {
#pragma unroll
  for (int c = 0; c < C; c++) {
    const int chunk = c * blockDim.x + threadIdx.x;
#pragma unroll
    for (int v = 0; v < 2; v++) {
      out[2 * c + v] = chunk < chunks ? load_activation(source + chunk * 8 + v * 4) : make_uint4(0, 0, 0, 0);
    }
  }
}

template <int kXLoads, bool kNorm>
__device__ __forceinline__ void unpack_x(const uint4* x, const uint4* gain, float* xs, float& squares) {
#pragma unroll
  for (int v = 0; v < kXLoads; v++) {
    unpack_bf16(x[v], xs + 8 * v);
    if constexpr (kNorm) {
      float gains[8];
      unpack_bf16(gain[v], gains);
#pragma unroll
      for (int j = 0; j < 8; j++) {
        squares = fmaf(xs[8 * v + j], xs[8 * v + j], squares);
        xs[8 * v + j] *= gains[j];
      }
    }
  }
}

// One of those chunks; x: its two loads.
__device__ __forceinline__ void unpack_wide_x(const uint4* x, const uint4& gain, float* xs, float& squares) {
  const uint32_t words[8] = {x[0].x, x[0].y, x[0].z, x[0].w, x[1].x, x[1].y, x[1].z, x[1].w};
  float gains[8];
  unpack_bf16(gain, gains);
#pragma unroll
  for (int j = 0; j < 8; j++) {
    xs[j] = __uint_as_float(words[j]);
    squares = fmaf(xs[j], xs[j], squares);
    xs[j] *= gains[j];
  }
}

template <WeightFormat F>
__device__ __forceinline__ void add_products(const float* ws, const float* xs, GroupScale<F> scale, float& sum) {
  if constexpr (WeightRows<F, 1, 1>::has_groups) {
    float dot = 0.0f;
#pragma unroll
    for (int j = 0; j < kChunk<F>; j++) dot = fmaf(ws[j], xs[j], dot);
    if constexpr (F == WeightFormat::int8_offset) {
      float total = 0.0f;  // the same for all rows
#pragma unroll
      for (int j = 0; j < kChunk<F>; j++) total += xs[j];
      sum = fmaf(__low2float(scale), dot, fmaf(__high2float(scale), total, sum));
    } else if constexpr (F == WeightFormat::fp8_blocks) {
      sum = fmaf(scale, dot, sum);
    } else {
      sum = fmaf(__half2float(scale), dot, sum);
    }
  } else {
#pragma unroll
    for (int j = 0; j < kChunk<F>; j++) sum = fmaf(ws[j], xs[j], sum);
  }
}

// partial[warp][row], the last row being the sums of squares, to the finished sum of row `lane`.
template <WeightFormat F, int R, int kMaxWarps, bool kNorm>
__device__ __forceinline__ float finish_sum(const GemvParams& p, const RowConstants<F>& constants,
                                            const float (*partial)[R + 1], int lane, int num_warps) {
  if (lane >= R) return 0.0f;
  float y = 0.0f;
  // Unrolled, so that all loads are under way at once: the next stage waits for this.
#pragma unroll
  for (int i = 0; i < kMaxWarps; i++) y += i < num_warps ? partial[i][lane] : 0.0f;
  if constexpr (kNorm) {
    float total = 0.0f;
#pragma unroll
    for (int i = 0; i < kMaxWarps; i++) total += i < num_warps ? partial[i][R] : 0.0f;
    y *= rsqrtf(total * p.inverse_cols + p.norm_eps);
  }
  return constants.apply(y);
}

template <WeightFormat F, int C, int R, XKind kKind, int kMaxThreads, int kMinBlocks>
__global__ void __launch_bounds__(kMaxThreads, kMinBlocks) gemv_fma_kernel(const GemvParams p) {
  constexpr int kVec = kChunk<F>;
  constexpr int kXLoads = kVec / 8;  // 16-byte loads of x that go with one of weights
  constexpr int kMaxWarps = kMaxThreads / 32;
  constexpr bool kNorm = kKind != XKind::plain, kWide = kKind == XKind::wide;
  __shared__ float partial[kMaxWarps][R + 1];  // last: sum of squares
  const int lane = threadIdx.x & 31, warp = warp_index(), chunks = p.cols / kVec;

  WeightRows<F, C, R> rows;
  rows.load(p, chunks);
  uint4 gain[kNorm ? C * kXLoads : 1];
  if constexpr (kNorm) load_chunks<C, kXLoads, true>(p.gain, chunks, gain);
  const int own_row = block_row<R>(p, blockIdx.x, lane & (R - 1));
  RowConstants<F> constants;
  if (warp == 0) constants.load(p, own_row);
  start_dependents();
  wait_for_predecessor();

  uint4 x[(kWide ? 2 : 1) * C * kXLoads];
  if constexpr (kWide) {
    load_wide_chunks<C>(wide_x(p), chunks, x);
  } else {
    load_chunks<C, kXLoads, false>(p.x, chunks, x);
  }
  const float old_residual = warp == 0 && lane < R ? load_residual(p, 0, own_row) : 0.0f;

  float sums[R] = {};
  float squares = 0.0f;
#pragma unroll
  for (int c = 0; c < C; c++) {
    float xs[kVec];
    if constexpr (kWide) {
      unpack_wide_x(x + 2 * c, gain[c], xs, squares);
    } else {
      unpack_x<kXLoads, kNorm>(x + c * kXLoads, gain + (kNorm ? c * kXLoads : 0), xs, squares);
    }
#pragma unroll
    for (int r = 0; r < R; r++) {
      float ws[kVec];
      unpack_weights<F>(rows.w[r][c], ws);
      constexpr bool kGroups = WeightRows<F, C, R>::has_groups;
      add_products<F>(ws, xs, rows.scale[kGroups ? r : 0][kGroups ? c : 0], sums[r]);
    }
  }

  warp_sums<R>(sums, lane);
  if constexpr (kNorm) squares = warp_sum(squares);
  constexpr int kLanesPerRow = 32 / R;
  if ((lane & (kLanesPerRow - 1)) == 0) partial[warp][lane / kLanesPerRow] = sums[0];
  if (kNorm && lane == 0) partial[warp][R] = squares;
  __syncthreads();
  if (warp != 0) return;
  const float y = finish_sum<F, R, kMaxWarps, kNorm>(p, constants, partial, lane, blockDim.x / 32);
  finish_rows<R>(p, y, lane, 0, blockIdx.x, own_row, old_residual);
}

template <WeightFormat F, XKind kKind, int kConfig>
void launch_fma_config(const GemvArgs& args, const GemvTile& tile, cudaStream_t stream, bool pdl) {
  constexpr FmaConfig c = fma_config(kConfig, kChunk<F> == 16);
  const auto kernel = gemv_fma_kernel<F, c.chunks, c.rows, kKind, c.max_threads, c.min_blocks>;
  thread_local int device = -1;
  prefer_l1(kernel, 0, device);  // a block has a kilobyte
  launch(kernel, dim3(gemv_blocks(args, c.rows)), dim3(tile.threads), 0, stream, pdl, gemv_params(args, c.rows, kKind));
}

template <WeightFormat F, XKind kKind, int kConfig = 0>
void launch_fma_configs(const GemvArgs& args, const GemvTile& tile, cudaStream_t stream, bool pdl) {
  if (tile.config == kConfig) return launch_fma_config<F, kKind, kConfig>(args, tile, stream, pdl);
  if constexpr (kConfig + 1 < num_fma_configs(kChunk<F> == 16)) {
    launch_fma_configs<F, kKind, kConfig + 1>(args, tile, stream, pdl);
  }
}

template <WeightFormat F>
void launch_gemv_fma(const GemvArgs& args, const GemvTile& tile, cudaStream_t stream, bool pdl) {
  launch_for_x_kind<F>(args, [&](auto kind) { launch_fma_configs<F, kind.value>(args, tile, stream, pdl); });
}

}  // namespace edgellm::kernels
