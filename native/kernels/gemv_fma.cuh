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
  } else if constexpr (F == WeightFormat::fp8) {
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

template <WeightFormat F, int C, int R, bool kNorm, int kMaxThreads, int kMinBlocks>
__global__ void __launch_bounds__(kMaxThreads, kMinBlocks) gemv_fma_kernel(const GemvParams p) {
  constexpr int kVec = kChunk<F>;
  constexpr int kXLoads = kVec / 8;  // 16-byte loads of x that go with one of weights
  constexpr bool kGroups = F == WeightFormat::int8;
  __shared__ float partial[kMaxThreads / 32][R + 1];  // last: sum of squares
  const int tid = threadIdx.x, lane = tid & 31, warp = warp_index();
  constexpr int kMaxWarps = kMaxThreads / 32;
  const int num_threads = blockDim.x, num_warps = num_threads / 32;
  const int chunks = p.cols / kVec;

  uint4 w[R][C];
  __half scale[kGroups ? R : 1][kGroups ? C : 1];
  const uint4* weights = static_cast<const uint4*>(p.data);
#pragma unroll
  for (int r = 0; r < R; r++) {
    const std::size_t row = block_row<R>(p, blockIdx.x, r);
#pragma unroll
    for (int c = 0; c < C; c++) {
      const int chunk = c * num_threads + tid;
      w[r][c] = chunk < chunks ? load_once(weights + row * chunks + chunk) : make_uint4(0, 0, 0, 0);
    }
  }
  if constexpr (kGroups) {
    const int num_groups = p.cols >> p.group_shift;
    constexpr int kVecShift = 4;  // 16 weights a chunk
#pragma unroll
    for (int c = 0; c < C; c++) {
      const int chunk = c * num_threads + tid;
      const int group = chunk >> (p.group_shift - kVecShift);
#pragma unroll
      for (int r = 0; r < R; r++) {
        const std::size_t row = block_row<R>(p, blockIdx.x, r);
        scale[r][c] = chunk < chunks ? __ldg(static_cast<const __half*>(p.scales) + row * num_groups + group)
                                     : __ushort_as_half(0);
      }
    }
  }
  uint4 gain[kNorm ? C * kXLoads : 1];
  if constexpr (kNorm) {
#pragma unroll
    for (int c = 0; c < C; c++) {
      const int chunk = c * num_threads + tid;
#pragma unroll
      for (int v = 0; v < kXLoads; v++) {
        gain[c * kXLoads + v] = chunk < chunks ? load_constant(p.gain + chunk * kVec + v * 8) : make_uint4(0, 0, 0, 0);
      }
    }
  }
  const int own_row = block_row<R>(p, blockIdx.x, tid & (R - 1));
  RowConstants<F> constants;
  if (warp == 0) constants.load(p, own_row);
  start_dependents();
  wait_for_predecessor();

  uint4 x[C * kXLoads];
#pragma unroll
  for (int c = 0; c < C; c++) {
    const int chunk = c * num_threads + tid;
#pragma unroll
    for (int v = 0; v < kXLoads; v++) {
      x[c * kXLoads + v] = chunk < chunks ? load_activation(p.x + chunk * kVec + v * 8) : make_uint4(0, 0, 0, 0);
    }
  }
  const float old_residual = tid < R ? load_residual(p, 0, own_row) : 0.0f;

  float sums[R];
  float squares = 0.0f;
#pragma unroll
  for (int r = 0; r < R; r++) sums[r] = 0.0f;
#pragma unroll
  for (int c = 0; c < C; c++) {
    float xs[kVec];
#pragma unroll
    for (int v = 0; v < kXLoads; v++) {
      unpack_bf16(x[c * kXLoads + v], xs + 8 * v);
      if constexpr (kNorm) {
        float gains[8];
        unpack_bf16(gain[c * kXLoads + v], gains);
#pragma unroll
        for (int j = 0; j < 8; j++) {
          squares = fmaf(xs[8 * v + j], xs[8 * v + j], squares);
          xs[8 * v + j] *= gains[j];
        }
      }
    }
#pragma unroll
    for (int r = 0; r < R; r++) {
      float ws[kVec];
      unpack_weights<F>(w[r][c], ws);
      if constexpr (kGroups) {
        float dot = 0.0f;
#pragma unroll
        for (int j = 0; j < kVec; j++) dot = fmaf(ws[j], xs[j], dot);
        sums[r] = fmaf(__half2float(scale[r][c]), dot, sums[r]);
      } else {
#pragma unroll
        for (int j = 0; j < kVec; j++) sums[r] = fmaf(ws[j], xs[j], sums[r]);
      }
    }
  }

  warp_sums<R>(sums, lane);
  if constexpr (kNorm) squares = warp_sum(squares);
  constexpr int kLanesPerRow = 32 / R;
  if ((lane & (kLanesPerRow - 1)) == 0) partial[warp][lane / kLanesPerRow] = sums[0];
  if (kNorm && lane == 0) partial[warp][R] = squares;
  __syncthreads();
  if (warp != 0) return;
  float y = 0.0f;
  if (lane < R) {
    // Unrolled, so that all loads are under way at once: the next stage waits for this.
#pragma unroll
    for (int i = 0; i < kMaxWarps; i++) y += i < num_warps ? partial[i][lane] : 0.0f;
    if constexpr (kNorm) {
      float total = 0.0f;
#pragma unroll
      for (int i = 0; i < kMaxWarps; i++) total += i < num_warps ? partial[i][R] : 0.0f;
      y *= rsqrtf(total * p.inverse_cols + p.norm_eps);
    }
    y = constants.apply(y);
  }
  finish_rows<R>(p, y, lane, 0, blockIdx.x, own_row, old_residual);
}

template <WeightFormat F, bool kNorm, int kConfig>
void launch_fma_config(const GemvArgs& args, const GemvTile& tile, cudaStream_t stream, bool pdl) {
  constexpr FmaConfig c = fma_config(kConfig, kChunk<F> == 16);
  launch(gemv_fma_kernel<F, c.chunks, c.rows, kNorm, c.max_threads, c.min_blocks>, dim3(gemv_blocks(args, c.rows)),
         dim3(tile.threads), 0, stream, pdl, gemv_params(args, c.rows));
}

template <WeightFormat F, bool kNorm, int kConfig = 0>
void launch_fma_norm(const GemvArgs& args, const GemvTile& tile, cudaStream_t stream, bool pdl) {
  if (tile.config == kConfig) return launch_fma_config<F, kNorm, kConfig>(args, tile, stream, pdl);
  if constexpr (kConfig + 1 < num_fma_configs(kChunk<F> == 16)) {
    launch_fma_norm<F, kNorm, kConfig + 1>(args, tile, stream, pdl);
  }
}

template <WeightFormat F>
void launch_gemv_fma(const GemvArgs& args, const GemvTile& tile, cudaStream_t stream, bool pdl) {
  if (args.gain) return launch_fma_norm<F, true>(args, tile, stream, pdl);
  launch_fma_norm<F, false>(args, tile, stream, pdl);
}

}  // namespace edgellm::kernels
