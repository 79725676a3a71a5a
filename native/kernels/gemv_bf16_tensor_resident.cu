// The GEMV kernel of tensor cores for bf16 weights and several tokens whose x stays in shared memory.
#include "gemv_tensor_resident.cuh"

namespace edgellm::kernels {

template void launch_tensor_resident<WeightFormat::bf16>(const GemvArgs&, const GemvTile&, cudaStream_t, bool);

}  // namespace edgellm::kernels
