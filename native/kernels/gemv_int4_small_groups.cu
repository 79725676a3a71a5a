// The int4 product with groups of 16 and 32, one to four tokens.
#include "gemv_int4.cuh"

namespace edgellm::kernels {

void launch_int4_small_groups(const GemvArgs& args, const GemvTile& tile, cudaStream_t stream, bool pdl) {
  if (args.weight.group == 32) return launch_int4<2, kMaxInt4Tokens>(args, tile, stream, pdl);
  launch_int4<4, kMaxInt4Tokens>(args, tile, stream, pdl);
}

}  // namespace edgellm::kernels
