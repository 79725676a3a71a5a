#pragma once

namespace edgellm::kernels {

// Whether kernels have thread block clusters and programmatic dependent launch on the current device: from compute
// capability 9.0, with code that was compiled for it, and unless EDGELLM_CUDA_CLUSTERS is "0".
bool has_clusters();

}  // namespace edgellm::kernels
