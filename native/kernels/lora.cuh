// What the GEMV kernels add to their rows for LoRA: B h, read 16 bytes for every eight ranks.
#pragma once

#include "device.cuh"
#include "edgellm/kernels/lora.hpp"

namespace edgellm::kernels {

// B h of `row` for `token`; a whole warp calls it, for R rows: lane l has row l % R, and the 32 / R lanes of a row
// share the ranks in eights. Every lane gets its row's sum. To be called after wait_for_predecessor.
//
// The eights are summed in pairs, their pairs, and so on, whether lanes have them or loads: a token's bits do not
// depend on R, which is another one alone than among others.
template <int R>
__device__ __forceinline__ float lora_sum(const LoraView& lora, int token, int row, int lane) {
  const int adapter = __ldg(lora.adapters + token);
  if (adapter == 0) return 0.0f;  // alike in all lanes
  const LoraLinear linear = lora.linears[adapter - 1];
  const bool second = row >= linear.first_row[0], third = row >= linear.first_row[1];
  const int rank = third ? linear.rank[2] : second ? linear.rank[1] : linear.rank[0];
  const int first_h = third ? linear.first_h[2] : second ? linear.first_h[1] : linear.first_h[0];
  const int first_b = third ? linear.first_b[1] : second ? linear.first_b[0] : 0;
  const int first_row = third ? linear.first_row[1] : second ? linear.first_row[0] : 0;
  const bf16* b = linear.b + first_b + static_cast<std::size_t>(row - first_row) * rank;
  const float* h = lora.h + static_cast<std::size_t>(token) * lora.h_stride + first_h;
  constexpr int kStep = 32 / R * kLoraAlign;  // ranks that the lanes of a row share in one go
  constexpr int kLoads = kMaxLoraRank > kStep ? kMaxLoraRank / kStep : 1;
  uint4 words[kLoads], low[kLoads], high[kLoads];
#pragma unroll
  for (int i = 0; i < kLoads; i++) {
    const int r = lane / R * kLoraAlign + i * kStep;
    const uint4 zero = make_uint4(0, 0, 0, 0);
    words[i] = r < rank ? load_constant(b + r) : zero;
    low[i] = r < rank ? load_l2(static_cast<const void*>(h + r)) : zero;
    high[i] = r < rank ? load_l2(static_cast<const void*>(h + r + 4)) : zero;
  }
  float sums[kLoads];
#pragma unroll
  for (int i = 0; i < kLoads; i++) {
    float weights[8], sum = 0.0f;
    unpack_bf16(words[i], weights);
    sum = fmaf(weights[0], __uint_as_float(low[i].x), sum);
    sum = fmaf(weights[1], __uint_as_float(low[i].y), sum);
    sum = fmaf(weights[2], __uint_as_float(low[i].z), sum);
    sum = fmaf(weights[3], __uint_as_float(low[i].w), sum);
    sum = fmaf(weights[4], __uint_as_float(high[i].x), sum);
    sum = fmaf(weights[5], __uint_as_float(high[i].y), sum);
    sum = fmaf(weights[6], __uint_as_float(high[i].z), sum);
    sum = fmaf(weights[7], __uint_as_float(high[i].w), sum);
#pragma unroll
    for (int s = R; s < 32; s *= 2) sum += __shfl_xor_sync(kAllLanes, sum, s);
    sums[i] = sum;
  }
#pragma unroll
  for (int s = 1; s < kLoads; s *= 2) {
#pragma unroll
    for (int i = 0; i < kLoads; i += 2 * s) sums[i] += sums[i + s];
  }
  return sums[0];
}

}  // namespace edgellm::kernels
