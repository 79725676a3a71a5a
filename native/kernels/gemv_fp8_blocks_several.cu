// The GEMV kernels for fp8 weights in blocks and several tokens, each with the bits it has alone.
#include "gemv_fma_several.cuh"

namespace edgellm::kernels {

template void launch_fma_several<WeightFormat::fp8_blocks>(const GemvArgs&, const GemvTile&, cudaStream_t, bool);

}  // namespace edgellm::kernels
