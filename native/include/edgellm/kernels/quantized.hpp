// Changes of weight layout and format: the int4 repacking done once at load, and dequantisation for prefill.
#pragma once

#include "edgellm/kernels/types.hpp"

namespace edgellm::kernels {

// Bytes of the repacked int4 data and scales; rows are padded to 16, cols to 64.
std::size_t int4_packed_data_bytes(int rows, int cols);
std::size_t int4_packed_scales_bytes(int rows, int cols, int group);

// From the bundle's layout to the GEMV's. `gate_up` says that rows are gate rows, then as many up rows, which are
// interleaved so that SwiGLU's two inputs meet in one block; see quantized.cu.
void repack_int4_async(const uint8_t* data,   // (rows, cols / 2) signed nibbles, low first
                       const __half* scales,  // (rows, cols / group)
                       int rows, int cols, int group, bool gate_up, void* packed_data, void* packed_scales,
                       cudaStream_t stream);

// Any format to bf16 (rows, cols) in the original order of rows; int4 from the repacked layout (`gate_up` as packed).
// Rows first_row to first_row + num_rows - 1 only, so that a scratch buffer can be smaller than the weight.
void dequantize_async(const WeightView& weight, bool gate_up, int first_row, int num_rows,
                      __nv_bfloat16* out,  // (num_rows, cols)
                      cudaStream_t stream, bool pdl);

// fp32 or fp16 (count) to bf16, and bf16 rows to E4M3 with one scale a row (largest magnitude to 448); `cols` is a
// multiple of 8.
void convert_to_bf16_async(const float* in, __nv_bfloat16* out, std::size_t count, cudaStream_t stream);
void convert_to_bf16_async(const __half* in, __nv_bfloat16* out, std::size_t count, cudaStream_t stream);
void quantize_fp8_async(const __nv_bfloat16* in,  // (rows, cols)
                        int rows, int cols,
                        uint8_t* out,   // (rows, cols)
                        float* scales,  // (rows)
                        cudaStream_t stream, bool pdl);

}  // namespace edgellm::kernels
