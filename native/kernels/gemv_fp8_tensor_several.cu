// The GEMV kernel of tensor cores for fp8 weights and several tokens.
#include "gemv_tensor_ring.cuh"

namespace edgellm::kernels {

template void launch_tensor_ring<WeightFormat::fp8, kMaxTensorTokens>(const GemvArgs&, const GemvTile&, cudaStream_t,
                                                                      bool);

}  // namespace edgellm::kernels
