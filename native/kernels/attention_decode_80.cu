// Decode attention for head_dim 80.
#include "attention_decode_launch.cuh"

namespace edgellm::kernels {

template void launch_for_head_dim<80>(const DecodeAttentionArgs&, const DecodeAttentionParams&, cudaStream_t, bool);

}  // namespace edgellm::kernels
