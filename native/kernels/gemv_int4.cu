// Int4 products: which of the compiled variants serves a call, and more tokens than one call takes in turns.
#include <algorithm>

#include "gemv_int4.cuh"
#include "gemv_mma.cuh"

namespace edgellm::kernels {

// Tokens that one launch computes; 0: x is too long for the shared memory. Their weights are read once, those of the
// next launch mostly from the L2 cache.
int int4_tokens_at_once(int cols) {
  constexpr std::size_t kOthers = 10 * 1024;  // statically allocated
  const std::size_t most = (device_traits().max_shared_bytes - kOthers) / int4_staged_bytes(cols);
  return static_cast<int>(std::min<std::size_t>(most, kMaxInt4Tokens));
}

void launch_gemv_int4(const GemvArgs& args, const GemvTile& tile, cudaStream_t stream, bool pdl) {
  const int warps = tile.threads / 32;
  if (args.weight.group >= 64 && args.num_tokens > 1 && int4_ring_fits(warps)) {
    return launch_int4_ring(args, warps, stream, pdl);
  }
  const int at_once = int4_tokens_at_once(args.weight.cols);
  for (int first = 0; first < args.num_tokens; first += at_once) {
    const GemvArgs part = gemv_part(args, first, at_once, kMmaRows);
    const bool part_pdl = pdl || first > 0;
    if (args.weight.group < 64) {
      launch_int4_small_groups(part, tile, stream, part_pdl);
    } else if (part.num_tokens == 1) {
      launch_int4_one(part, tile, stream, part_pdl);
    } else {
      launch_int4_several(part, tile, stream, part_pdl);
    }
  }
}

template <>
void launch_gemv_mma<WeightFormat::int4>(const GemvArgs& args, const GemvTile& tile, cudaStream_t stream, bool pdl) {
  if (args.weight.group >= 64) return launch_mma_config<WeightFormat::int4, 1>(args, tile, stream, pdl);
  if (args.weight.group == 32) return launch_mma_config<WeightFormat::int4, 2>(args, tile, stream, pdl);
  launch_mma_config<WeightFormat::int4, 4>(args, tile, stream, pdl);
}

}  // namespace edgellm::kernels
