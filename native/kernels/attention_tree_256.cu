// Tree attention for head_dim 256.
#include "attention_tree.cuh"

namespace edgellm::kernels {

template void launch_tree_head_dim<256>(const TreeAttentionArgs&, const TreeAttentionParams&, cudaStream_t, bool);

}  // namespace edgellm::kernels
