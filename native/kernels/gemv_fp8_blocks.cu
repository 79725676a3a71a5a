// The GEMV kernels for fp8 weights in blocks.
#include "gemv_fma.cuh"
#include "gemv_mma.cuh"

namespace edgellm::kernels {

template void launch_gemv_fma<WeightFormat::fp8_blocks>(const GemvArgs&, const GemvTile&, cudaStream_t, bool);

template <>
void launch_gemv_mma<WeightFormat::fp8_blocks>(const GemvArgs& args, const GemvTile& tile, cudaStream_t stream,
                                               bool pdl) {
  launch_mma_config<WeightFormat::fp8_blocks, 1>(args, tile, stream, pdl);
}

}  // namespace edgellm::kernels
