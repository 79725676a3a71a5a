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

// Eight columns a thread.
template <WeightFormat F>
__global__ void __launch_bounds__(kThreads)
    dequantize_kernel(const WeightView w, bool gate_up, int first_row, std::size_t count, bf16* out) {
  const std::size_t index = (static_cast<std::size_t>(blockIdx.x) * kThreads + threadIdx.x) * 8;
  start_dependents();
  wait_for_predecessor();
  if (index >= count) return;
  const int row = first_row + static_cast<int>(index / w.cols), column = static_cast<int>(index % w.cols);
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
  } else if constexpr (F == WeightFormat::fp8) {
    const uint2 v = __ldg(reinterpret_cast<const uint2*>(static_cast<const uint8_t*>(w.data) + at));
    const float scale = static_cast<const float*>(w.scales)[row] * (1.0f / kFp8ToFp16);
    const uint32_t words[2] = {v.x, v.y};
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const float2 two = unpack_fp16(fp8x2_to_fp16x2(words[i / 2] >> (16 * (i & 1))));
      values[2 * i] = two.x * scale, values[2 * i + 1] = two.y * scale;
    }
  } else if constexpr (F == WeightFormat::int8) {
    const uint2 v = __ldg(reinterpret_cast<const uint2*>(static_cast<const int8_t*>(w.data) + at));
    const float scale = __half2float(
        static_cast<const __half*>(w.scales)[static_cast<std::size_t>(row) * (w.cols / w.group) + column / w.group]);
    const uint32_t words[2] = {v.x, v.y};
#pragma unroll
    for (int i = 0; i < 8; i++) {
      values[i] = static_cast<float>(static_cast<int8_t>(words[i / 4] >> (8 * (i & 3)))) * scale;
    }
  } else {
    const int half = w.rows / 2, in_half = row % (gate_up ? half : w.rows);
    const int tile = gate_up ? in_half / 8 : row / 16;
    const int r = gate_up ? (in_half & 7) + (row < half ? 0 : 8) : row & 15;
    const int num_blocks = ceil_div(w.cols, 64), block = column / 64, s = (column & 63) / 16;
    const int num_groups = w.group >= 64 ? w.cols / w.group : num_blocks * 64 / w.group;
    const float scale = __half2float(static_cast<const __half*>(
        w.scales)[(static_cast<std::size_t>(tile) * num_groups + column / w.group) * 16 + (r & 7) * 2 + (r >> 3)]);
#pragma unroll
    for (int i = 0; i < 2; i++) {  // four columns, one lane's word
      const int lane = (r & 7) * 4 + ((column & 15) / 4 + i);
      const uint32_t word = static_cast<const uint32_t*>(
          w.data)[((static_cast<std::size_t>(tile) * num_blocks + block) * 32 + lane) * 4 + s];
#pragma unroll
      for (int k = 0; k < 4; k++) {
        const int j = (r >> 3) + 2 * (k >> 1);
        const int nibble = static_cast<int>((word >> (4 * j + 16 * (k & 1))) & 15u);
        values[4 * i + k] = static_cast<float>(nibble - 8) * scale;
      }
    }
  }
  *reinterpret_cast<uint4*>(out + index) = make_uint4(pack_bf16(values[0], values[1]), pack_bf16(values[2], values[3]),
                                                      pack_bf16(values[4], values[5]), pack_bf16(values[6], values[7]));
}

template <class T>
__global__ void __launch_bounds__(kThreads) convert_kernel(const T* in, bf16* out, std::size_t count) {
  const std::size_t i = static_cast<std::size_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i < count) out[i] = __float2bfloat16(static_cast<float>(in[i]));
}

// A block a row.
__global__ void __launch_bounds__(kThreads) quantize_fp8_kernel(const bf16* in, int cols, uint8_t* out, float* scales) {
  __shared__ float warp_maxima[kThreads / 32];
  const bf16* row = in + static_cast<std::size_t>(blockIdx.x) * cols;
  float largest = 0.0f;
  for (int i = threadIdx.x; i < cols; i += kThreads) largest = fmaxf(largest, fabsf(__bfloat162float(row[i])));
  largest = warp_max(largest);
  if ((threadIdx.x & 31) == 0) warp_maxima[threadIdx.x / 32] = largest;
  __syncthreads();
  for (int i = 0; i < kThreads / 32; i++) largest = fmaxf(largest, warp_maxima[i]);
  const float scale = largest > 0.0f ? largest / 448.0f : 1.0f;
  for (int i = threadIdx.x; i < cols; i += kThreads) {
    out[static_cast<std::size_t>(blockIdx.x) * cols + i] =
        __nv_cvt_float_to_fp8(__bfloat162float(row[i]) / scale, __NV_SATFINITE, __NV_E4M3);
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
  const std::size_t count = static_cast<std::size_t>(num_rows) * weight.cols;
  const auto run = [&](auto kernel) {
    launch(kernel, dim3(blocks_for(count / 8)), dim3(kThreads), 0, stream, pdl, weight, gate_up, first_row, count, out);
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
    case WeightFormat::int4:
      return run(dequantize_kernel<WeightFormat::int4>);
  }
}

void convert_to_bf16_async(const float* in, bf16* out, std::size_t count, cudaStream_t stream) {
  launch(convert_kernel<float>, dim3(blocks_for(count)), dim3(kThreads), 0, stream, false, in, out, count);
}

void convert_to_bf16_async(const __half* in, bf16* out, std::size_t count, cudaStream_t stream) {
  launch(convert_kernel<__half>, dim3(blocks_for(count)), dim3(kThreads), 0, stream, false, in, out, count);
}

void quantize_fp8_async(const bf16* in, int rows, int cols, uint8_t* out, float* scales, cudaStream_t stream) {
  launch(quantize_fp8_kernel, dim3(rows), dim3(kThreads), 0, stream, false, in, cols, out, scales);
}

}  // namespace edgellm::kernels
