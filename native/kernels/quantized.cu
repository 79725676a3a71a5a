// Weight layouts: int4 into the order of the tensor cores' fragments, everything to bf16 for prefill, bf16 to E4M3.
//
// Packed int4: [tile of 16 rows][block of 64 input features][lane][16 bytes]. Lane (g, t) = (lane / 4, lane % 4) holds
// word s = 0..3 for the input features 16 s + 4 t + {0, 1, 2, 3}; nibble j of a word's lower half and nibble j of its
// upper half are the pair of fragment register j: j = 0: row g, features 0 and 1; j = 1: row g + 8, the same;
// j = 2: row g, features 2 and 3; j = 3: row g + 8, the same. A nibble is the weight plus 8.
// Packed scales: [tile][group][g][2] fp16, of rows g and g + 8. Tiles of gate_up are 8 gate rows and their 8 up rows.
#include <cassert>

#include "device.cuh"
#include "edgellm/kernels/quantized.hpp"
#include "launch.hpp"

namespace edgellm::kernels {

namespace {

constexpr int kThreads = 256;

// Row of the original weight at row r of packed tile `tile`; -1: padding.
__device__ __forceinline__ int packed_row(int tile, int r, int rows, bool gate_up) {
  if (!gate_up) return tile * 16 + r < rows ? tile * 16 + r : -1;
  const int gate = tile * 8 + (r & 7);
  if (gate >= rows / 2) return -1;
  return r < 8 ? gate : rows / 2 + gate;
}

__global__ void __launch_bounds__(kThreads)
    repack_data_kernel(const uint8_t* data, int rows, int cols, bool gate_up, int num_blocks, std::size_t num_words,
                       uint32_t* packed) {
  const std::size_t index = static_cast<std::size_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (index >= num_words) return;
  const int s = index & 3, lane = (index >> 2) & 31, g = lane >> 2, t = lane & 3;
  const std::size_t tile_block = index >> 7;
  const int tile = static_cast<int>(tile_block / num_blocks), block = static_cast<int>(tile_block % num_blocks);
  uint32_t word = 0;
#pragma unroll
  for (int j = 0; j < 4; j++) {
    const int row = packed_row(tile, g + 8 * (j & 1), rows, gate_up);
    const int column = block * 64 + s * 16 + t * 4 + 2 * (j >> 1);
    uint32_t two = 0x88;  // zeros
    if (row >= 0 && column < cols) {
      two = data[(static_cast<std::size_t>(row) * cols + column) / 2] ^ 0x88u;  // signed to weight + 8
    }
    word |= (two & 15u) << (4 * j) | (two >> 4) << (4 * j + 16);
  }
  packed[index] = word;
}

__global__ void __launch_bounds__(kThreads)
    repack_scales_kernel(const __half* scales, int rows, int num_groups, bool gate_up, int num_packed_groups,
                         std::size_t count, __half* packed) {
  const std::size_t index = static_cast<std::size_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (index >= count) return;
  const int r = static_cast<int>((index >> 1) & 7) + 8 * static_cast<int>(index & 1);
  const std::size_t tile_group = index >> 4;
  const int tile = static_cast<int>(tile_group / num_packed_groups);
  const int group = static_cast<int>(tile_group % num_packed_groups);
  const int row = packed_row(tile, r, rows, gate_up);
  const bool inside = row >= 0 && group < num_groups;
  packed[index] = inside ? scales[static_cast<std::size_t>(row) * num_groups + group] : __ushort_as_half(0);
}

int packed_groups(int cols, int group) {
  const int padded = ceil_div(cols, 64) * 64;
  return group >= 64 ? cols / group : padded / group;
}

// Of blocks over rows and columns: eight columns a thread.
template <WeightFormat F>
__global__ void __launch_bounds__(kThreads) dequantize_kernel(const WeightView w, int first_row, bf16* out) {
  start_dependents();
  wait_for_predecessor();
  const int column = static_cast<int>(blockIdx.y * kThreads + threadIdx.x) * 8;
  if (column >= w.cols) return;
  const int row = first_row + static_cast<int>(blockIdx.x);
  const std::size_t at = static_cast<std::size_t>(row) * w.cols + column;
  float values[8];
  if constexpr (F == WeightFormat::bf16) {
    unpack_bf16(load_once(static_cast<const bf16*>(w.data) + at), values);
  } else if constexpr (F == WeightFormat::fp16) {
    const uint4 v = load_once(static_cast<const __half*>(w.data) + at);
    const uint32_t words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const float2 two = unpack_fp16(words[i]);
      values[2 * i] = two.x, values[2 * i + 1] = two.y;
    }
  } else if constexpr (F == WeightFormat::fp8 || F == WeightFormat::fp8_blocks) {
    const uint2 v = __ldg(reinterpret_cast<const uint2*>(static_cast<const uint8_t*>(w.data) + at));
    const std::size_t scale_at = F == WeightFormat::fp8 ? row : at / static_cast<unsigned>(w.group);
    const float scale = static_cast<const float*>(w.scales)[scale_at] * (1.0f / kFp8ToFp16);
    const uint32_t words[2] = {v.x, v.y};
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const float2 two = unpack_fp16(fp8x2_to_fp16x2(words[i / 2] >> (16 * (i & 1))));
      values[2 * i] = two.x * scale, values[2 * i + 1] = two.y * scale;
    }
  } else {
    static_assert(F == WeightFormat::int8 || F == WeightFormat::int8_offset);
    const uint2 v = __ldg(reinterpret_cast<const uint2*>(static_cast<const int8_t*>(w.data) + at));
    const int group_bits = 31 - __clz(w.group);  // a power of two
    float scale, offset = 0.0f;
    if constexpr (F == WeightFormat::int8) {
      scale = __half2float(static_cast<const __half*>(w.scales)[at >> group_bits]);
    } else {
      const float2 both = __half22float2(static_cast<const __half2*>(w.scales)[at >> group_bits]);
      scale = both.x, offset = both.y;
    }
    const uint32_t words[2] = {v.x, v.y};
#pragma unroll
    for (int i = 0; i < 8; i++) {
      values[i] = fmaf(static_cast<float>(static_cast<int8_t>(words[i / 4] >> (8 * (i & 3)))), scale, offset);
    }
  }
  *reinterpret_cast<uint4*>(out + static_cast<std::size_t>(blockIdx.x) * w.cols + column) =
      make_uint4(pack_bf16(values[0], values[1]), pack_bf16(values[2], values[3]), pack_bf16(values[4], values[5]),
                 pack_bf16(values[6], values[7]));
}

// Nibbles j of the low and the high half of `word` (weights plus 8), times scale, as two bf16. Exact until the last
// rounding: the bf16 number 128 + nibble, and 136 times an fp16 number, are exact.
__device__ __forceinline__ uint32_t dequantize_nibbles(uint32_t word, int j, float scale) {
  uint32_t plus_128;
  asm("lop3.b32 %0,%1,0x000f000f,0x43004300,0xEA;" : "=r"(plus_128) : "r"(word >> (4 * j)));
  const float offset = -136.0f * scale;
  return pack_bf16(fmaf(low_float(plus_128), scale, offset), fmaf(high_float(plus_128), scale, offset));
}

// A warp a packed tile and block of 64 columns; a lane has 16 columns of two rows. kGroups scales a block and row.
template <int kGroups>
__global__ void __launch_bounds__(kThreads)
    dequantize_int4_kernel(const WeightView w, bool gate_up, int first_row, int num_rows, int first_tile, bf16* out) {
  start_dependents();
  wait_for_predecessor();
  const int lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3;
  const int tile = first_tile + static_cast<int>(blockIdx.x);
  const int block = static_cast<int>(blockIdx.y * (kThreads / 32) + threadIdx.x / 32),
            num_blocks = ceil_div(w.cols, 64);
  if (block >= num_blocks) return;
  int row[2];  // in `out`, or -1
  bool any = false;
#pragma unroll
  for (int i = 0; i < 2; i++) {
    const int original = packed_row(tile, g + 8 * i, w.rows, gate_up);
    row[i] = original >= first_row && original < first_row + num_rows ? original - first_row : -1;
    any |= row[i] >= 0;
  }
  if (!any) return;
  const uint4 v = load_constant(static_cast<const uint4*>(w.data) +
                                (static_cast<std::size_t>(tile) * num_blocks + block) * 32 + lane);
  const uint32_t words[4] = {v.x, v.y, v.z, v.w};
  const int num_groups = w.group >= 64 ? w.cols / w.group : num_blocks * kGroups;
  const int first_group = w.group >= 64 ? block * 64 / w.group : block * kGroups;
  const __half2* scales =
      static_cast<const __half2*>(w.scales) + (static_cast<std::size_t>(tile) * num_groups + first_group) * 8 + g;
#pragma unroll
  for (int s = 0; s < 4; s++) {
    const int column = block * 64 + s * 16 + t * 4;
    if (column >= w.cols) break;  // whole steps: cols is a multiple of 16
    const float2 scale = __half22float2(__ldg(scales + s * kGroups / 4 * 8));
    if (row[0] >= 0) {
      *reinterpret_cast<uint2*>(out + static_cast<std::size_t>(row[0]) * w.cols + column) =
          make_uint2(dequantize_nibbles(words[s], 0, scale.x), dequantize_nibbles(words[s], 2, scale.x));
    }
    if (row[1] >= 0) {
      *reinterpret_cast<uint2*>(out + static_cast<std::size_t>(row[1]) * w.cols + column) =
          make_uint2(dequantize_nibbles(words[s], 1, scale.y), dequantize_nibbles(words[s], 3, scale.y));
    }
  }
}

void dequantize_int4_async(const WeightView& w, bool gate_up, int first_row, int num_rows, bf16* out,
                           cudaStream_t stream, bool pdl) {
  // Tiles with any of the rows. Of gate_up, a tile has eight gate rows and the eight up rows of the same numbers.
  const int last_row = first_row + num_rows - 1, half = w.rows / 2;
  int first_tile = first_row / 16, last_tile = last_row / 16;
  if (gate_up) {
    const bool both = first_row < half && last_row >= half;
    first_tile = both ? 0 : first_row % half / 8;
    last_tile = (both ? half - 1 : last_row % half) / 8;
  }
  const auto run = [&](auto kernel) {
    const dim3 grid(last_tile - first_tile + 1, ceil_div(ceil_div(w.cols, 64), kThreads / 32));
    launch(kernel, grid, dim3(kThreads), 0, stream, pdl, w, gate_up, first_row, num_rows, first_tile, out);
  };
  switch (w.group) {
    case 16:
      return run(dequantize_int4_kernel<4>);
    case 32:
      return run(dequantize_int4_kernel<2>);
    default:
      return run(dequantize_int4_kernel<1>);
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads) convert_kernel(const T* in, bf16* out, std::size_t count) {
  const std::size_t i = static_cast<std::size_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i < count) out[i] = __float2bfloat16(static_cast<float>(in[i]));
}

// A block a row, read a second time from the cache where it just came.
__global__ void __launch_bounds__(kThreads) quantize_fp8_kernel(const bf16* in, int cols, uint8_t* out, float* scales) {
  __shared__ float warp_maxima[kThreads / 32];
  start_dependents();
  wait_for_predecessor();
  const std::size_t row = static_cast<std::size_t>(blockIdx.x) * cols;
  float largest = 0.0f;
  for (int i = threadIdx.x * 8; i < cols; i += kThreads * 8) {
    float v[8];
    unpack_bf16(load_activation(in + row + i), v);
#pragma unroll
    for (int j = 0; j < 8; j++) largest = fmaxf(largest, fabsf(v[j]));
  }
  largest = warp_max(largest);
  if ((threadIdx.x & 31) == 0) warp_maxima[threadIdx.x / 32] = largest;
  __syncthreads();
  for (int i = 0; i < kThreads / 32; i++) largest = fmaxf(largest, warp_maxima[i]);
  const float scale = largest > 0.0f ? largest / 448.0f : 1.0f;
  for (int i = threadIdx.x * 8; i < cols; i += kThreads * 8) {
    float v[8];
    unpack_bf16(load_activation(in + row + i), v);
    uint32_t words[2] = {};
#pragma unroll
    for (int j = 0; j < 8; j += 2) {
      const uint32_t two =
          __nv_cvt_float2_to_fp8x2(make_float2(v[j] / scale, v[j + 1] / scale), __NV_SATFINITE, __NV_E4M3);
      words[j / 4] |= two << (8 * (j & 3));
    }
    *reinterpret_cast<uint2*>(out + row + i) = make_uint2(words[0], words[1]);
  }
  if (threadIdx.x == 0) scales[blockIdx.x] = scale;
}

unsigned blocks_for(std::size_t threads) { return static_cast<unsigned>((threads + kThreads - 1) / kThreads); }

}  // namespace

std::size_t int4_packed_data_bytes(int rows, int cols) {
  return static_cast<std::size_t>(ceil_div(rows, 16)) * ceil_div(cols, 64) * 512;
}

std::size_t int4_packed_scales_bytes(int rows, int cols, int group) {
  return static_cast<std::size_t>(ceil_div(rows, 16)) * packed_groups(cols, group) * 32;
}

void repack_int4_async(const uint8_t* data, const __half* scales, int rows, int cols, int group, bool gate_up,
                       void* packed_data, void* packed_scales, cudaStream_t stream) {
  assert(cols % 16 == 0 && cols % group == 0 && (!gate_up || rows % 2 == 0));
  const std::size_t num_words = int4_packed_data_bytes(rows, cols) / 4;
  launch(repack_data_kernel, dim3(blocks_for(num_words)), dim3(kThreads), 0, stream, false, data, rows, cols, gate_up,
         ceil_div(cols, 64), num_words, static_cast<uint32_t*>(packed_data));
  const std::size_t num_scales = int4_packed_scales_bytes(rows, cols, group) / 2;
  launch(repack_scales_kernel, dim3(blocks_for(num_scales)), dim3(kThreads), 0, stream, false, scales, rows,
         cols / group, gate_up, packed_groups(cols, group), num_scales, static_cast<__half*>(packed_scales));
}

void dequantize_async(const WeightView& weight, bool gate_up, int first_row, int num_rows, bf16* out,
                      cudaStream_t stream, bool pdl) {
  const auto run = [&](auto kernel) {
    const dim3 grid(num_rows, ceil_div(weight.cols, 8 * kThreads));
    launch(kernel, grid, dim3(kThreads), 0, stream, pdl, weight, first_row, out);
  };
  switch (weight.format) {
    case WeightFormat::bf16:
      return run(dequantize_kernel<WeightFormat::bf16>);
    case WeightFormat::fp16:
      return run(dequantize_kernel<WeightFormat::fp16>);
    case WeightFormat::fp8:
      return run(dequantize_kernel<WeightFormat::fp8>);
    case WeightFormat::int8:
      return run(dequantize_kernel<WeightFormat::int8>);
    case WeightFormat::int8_offset:
      return run(dequantize_kernel<WeightFormat::int8_offset>);
    case WeightFormat::fp8_blocks:
      return run(dequantize_kernel<WeightFormat::fp8_blocks>);
    case WeightFormat::int4:
      return dequantize_int4_async(weight, gate_up, first_row, num_rows, out, stream, pdl);
  }
}

void convert_to_bf16_async(const float* in, bf16* out, std::size_t count, cudaStream_t stream) {
  launch(convert_kernel<float>, dim3(blocks_for(count)), dim3(kThreads), 0, stream, false, in, out, count);
}

void convert_to_bf16_async(const __half* in, bf16* out, std::size_t count, cudaStream_t stream) {
  launch(convert_kernel<__half>, dim3(blocks_for(count)), dim3(kThreads), 0, stream, false, in, out, count);
}

void quantize_fp8_async(const bf16* in, int rows, int cols, uint8_t* out, float* scales, cudaStream_t stream,
                        bool pdl) {
  assert(cols % 8 == 0);
  launch(quantize_fp8_kernel, dim3(rows), dim3(kThreads), 0, stream, pdl, in, cols, out, scales);
}

}  // namespace edgellm::kernels
