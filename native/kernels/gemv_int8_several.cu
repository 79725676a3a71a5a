// The GEMV kernels for int8 weights and several tokens, each with the bits it has alone.
#include "gemv_fma_several.cuh"

namespace edgellm::kernels {

template void launch_fma_several<WeightFormat::int8>(const GemvArgs&, const GemvTile&, cudaStream_t, bool);

}  // namespace edgellm::kernels
