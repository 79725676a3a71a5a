// The GEMV kernels of tensor cores for fp8 weights and one token.
#include "gemv_tensor_once.cuh"
#include "gemv_tensor_ring.cuh"

namespace edgellm::kernels {

template void launch_tensor_once<WeightFormat::fp8>(const GemvArgs&, const GemvTile&, cudaStream_t, bool);
template void launch_tensor_ring<WeightFormat::fp8, 1>(const GemvArgs&, const GemvTile&, cudaStream_t, bool);

}  // namespace edgellm::kernels
