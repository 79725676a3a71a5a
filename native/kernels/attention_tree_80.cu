// Tree attention for head_dim 80.
#include "attention_tree.cuh"

namespace edgellm::kernels {

template void launch_tree_head_dim<80>(const TreeAttentionArgs&, const TreeAttentionParams&, cudaStream_t, bool);

}  // namespace edgellm::kernels
