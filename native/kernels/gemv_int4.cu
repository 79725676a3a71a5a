// Int4 products: which of the compiled variants serves a call, and more tokens than one call takes in turns.
#include <algorithm>

#include "gemv_int4.cuh"
#include "gemv_mma.cuh"

namespace edgellm::kernels {

// Tokens of small groups that one launch computes; 0: x is too long for the shared memory. Their weights are read once,
// those of the next launch mostly from the L2 cache.
int int4_tokens_at_once(int cols, const GemvDevice& device) {
  constexpr std::size_t kOthers = 10 * 1024;  // statically allocated
  const std::size_t most = (device.max_shared_bytes - kOthers) / int4_staged_bytes(cols);
  return static_cast<int>(std::min<std::size_t>(most, kMaxInt4Tokens));
}

void launch_gemv_int4(const GemvArgs& args, const GemvTile& tile, cudaStream_t stream, bool pdl) {
  if (args.weight.group >= 64) {
    if (args.num_tokens == 1) return launch_int4_one(args, tile, stream, pdl);
    return launch_int4_ring(args, tile.threads / 32, stream, pdl);
  }
  const int at_once = int4_tokens_at_once(args.weight.cols, gemv_device());
  for (int first = 0; first < args.num_tokens; first += at_once) {
    const GemvArgs part = gemv_part(args, first, at_once, kMmaRows);
    launch_int4_small_groups(part, tile, stream, pdl || first > 0);
  }
}

template <>
void launch_gemv_mma<WeightFormat::int4>(const GemvArgs& args, const GemvTile& tile, cudaStream_t stream, bool pdl) {
  if (args.weight.group >= 64) return launch_mma_config<WeightFormat::int4, 1>(args, tile, stream, pdl);
  if (args.weight.group == 32) return launch_mma_config<WeightFormat::int4, 2>(args, tile, stream, pdl);
  launch_mma_config<WeightFormat::int4, 4>(args, tile, stream, pdl);
}

}  // namespace edgellm::kernels
