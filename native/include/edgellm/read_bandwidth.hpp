// The speed limit of decoding: how fast this GPU reads its memory.
#pragma once

#include <cstddef>

namespace edgellm {

// GB/s (1e9 bytes) of a kernel that only reads, the best of several passes over `num_bytes`, which it allocates for the
// time of the call. Should be several times the L2 cache. Waits.
double measure_read_bandwidth(std::size_t num_bytes);

}  // namespace edgellm
