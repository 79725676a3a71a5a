// The GEMV kernels for int8 weights with an offset for each group and several tokens, each with the bits it has alone.
#include "gemv_fma_several.cuh"

namespace edgellm::kernels {

template void launch_fma_several<WeightFormat::int8_offset>(const GemvArgs&, const GemvTile&, cudaStream_t, bool);

}  // namespace edgellm::kernels
