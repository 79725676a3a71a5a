// The GEMV kernels for fp16 weights.
#include "gemv_fma.cuh"
#include "gemv_mma.cuh"

namespace edgellm::kernels {

template void launch_gemv_fma<WeightFormat::fp16>(const GemvArgs&, const GemvTile&, cudaStream_t, bool);

template <>
void launch_gemv_mma<WeightFormat::fp16>(const GemvArgs& args, const GemvTile& tile, cudaStream_t stream, bool pdl) {
  launch_mma_config<WeightFormat::fp16, 1>(args, tile, stream, pdl);
}

}  // namespace edgellm::kernels
