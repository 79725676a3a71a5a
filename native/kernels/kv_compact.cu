// Moves an accepted path's rows of the KV cache together, all layers in one launch.
#include <cassert>

#include "device.cuh"
#include "edgellm/kernels/kv_compact.hpp"
#include "launch.hpp"

namespace edgellm::kernels {

namespace {

constexpr int kThreads = 128;
constexpr int kInFlight = 8;

// kLanes threads, 16 bytes a row each, have one head's keys, or values, of one slice. A lane's rows are its own columns
// only, and later sources lie behind earlier targets: loads need no order but their own.
template <int kLanes>
__global__ void __launch_bounds__(kThreads) kv_compact_kernel(const KvCompactArgs p, int row_chunks) {
  start_dependents();
  wait_for_predecessor();
  const int sequence = blockIdx.y, lane = threadIdx.x % kLanes;
  const int heads = p.num_heads, index = blockIdx.x * (kThreads / kLanes) + threadIdx.x / kLanes;
  const int position = *static_cast<const volatile int32_t*>(p.positions + sequence);
  const int count = min(*static_cast<const volatile int32_t*>(p.counts + sequence), p.max_nodes);
  if (position < 0 || index >= p.num_slices * heads || lane >= row_chunks) return;
  const std::size_t slot =
      static_cast<std::size_t>(index / heads) * p.num_slots + *static_cast<const volatile int32_t*>(p.slots + sequence);
  uint4* rows = static_cast<uint4*>(p.cache) + ((slot * heads + index % heads) * p.capacity + position) * row_chunks;
  const int32_t* path = p.paths + static_cast<std::size_t>(sequence) * p.max_nodes;
  for (int first = 0; first < count; first += kInFlight) {
    uint4 row[kInFlight];
    int from[kInFlight];
#pragma unroll
    for (int i = 0; i < kInFlight; i++) {
      from[i] = first + i < count ? __ldcg(path + first + i) : -1;
      if (from[i] > first + i) row[i] = load_l2(rows + static_cast<std::size_t>(from[i]) * row_chunks + lane);
    }
#pragma unroll
    for (int i = 0; i < kInFlight; i++) {
      if (from[i] > first + i) rows[static_cast<std::size_t>(first + i) * row_chunks + lane] = row[i];
    }
  }
}

}  // namespace

void kv_compact_async(const KvCompactArgs& args, cudaStream_t stream, bool pdl) {
  const int row_chunks = static_cast<int>(args.head_dim * kv_element_bytes(args.format) / 16);
  assert(row_chunks >= 1 && row_chunks <= 32 && args.head_dim % 16 == 0);
  const auto run = [&](auto kernel, int lanes) {
    const int blocks = ceil_div(args.num_slices * args.num_heads, kThreads / lanes);
    launch(kernel, dim3(blocks, args.num_sequences), dim3(kThreads), 0, stream, pdl, args, row_chunks);
  };
  if (row_chunks <= 16) return run(kv_compact_kernel<16>, 16);
  run(kv_compact_kernel<32>, 32);
}

}  // namespace edgellm::kernels
