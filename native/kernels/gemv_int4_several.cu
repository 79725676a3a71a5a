// The int4 product of two to four tokens, groups of 64 and more.
#include "gemv_int4.cuh"

namespace edgellm::kernels {

void launch_int4_several(const GemvArgs& args, const GemvTile& tile, cudaStream_t stream, bool pdl) {
  launch_int4<1, kMaxInt4Tokens>(args, tile, stream, pdl);
}

}  // namespace edgellm::kernels
