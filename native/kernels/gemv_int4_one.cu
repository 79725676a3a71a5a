// The int4 product of one token, groups of 64 and more.
#include "gemv_int4.cuh"

namespace edgellm::kernels {

void launch_int4_one(const GemvArgs& args, const GemvTile& tile, cudaStream_t stream, bool pdl) {
  launch_int4<1, 1>(args, tile, stream, pdl);
}

}  // namespace edgellm::kernels
