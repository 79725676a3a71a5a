#include "bindings.hpp"

PYBIND11_MODULE(_native, module) {
  module.doc() = "edgellm_ros's CUDA runtime; import it through edgellm_ros.native, which says why it is absent.";
  edgellm::bind_device(module);
  edgellm::bind_tensor(module);
  edgellm::bind_decoder(module);  // first: WeightFormat and Activation, which the kernels' calls name
  edgellm::bind_kernels(module);
  edgellm::bind_trt(module);
}
