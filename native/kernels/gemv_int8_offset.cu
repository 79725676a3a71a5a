// The GEMV kernels for int8 weights with an offset for each group.
#include "gemv_fma.cuh"
#include "gemv_mma.cuh"

namespace edgellm::kernels {

template void launch_gemv_fma<WeightFormat::int8_offset>(const GemvArgs&, const GemvTile&, cudaStream_t, bool);

template <>
void launch_gemv_mma<WeightFormat::int8_offset>(const GemvArgs& args, const GemvTile& tile, cudaStream_t stream,
                                                bool pdl) {
  launch_mma_config<WeightFormat::int8_offset, 1>(args, tile, stream, pdl);
}

}  // namespace edgellm::kernels
