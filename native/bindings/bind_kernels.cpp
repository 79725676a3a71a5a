// `_native.kernels`: every kernel on its own, for tests and measurements; device arrays come by DLPack.
#include "bindings.hpp"

namespace edgellm {

void bind_kernels(pybind11::module_& module) {
  pybind11::module_ kernels = module.def_submodule("kernels", "The CUDA kernels; launches are asynchronous.");
  bind_quantized(kernels);
  bind_products(kernels);
  bind_gemm_int4(kernels);
  bind_gemv(kernels);
  bind_lora(kernels);
  bind_embedding(kernels);
  bind_attention_decode(kernels);
  bind_attention_prefill(kernels);
  bind_attention_tree(kernels);
  bind_draft_acceptance(kernels);
  bind_rms_norm(kernels);
  bind_rope(kernels);
  bind_swiglu(kernels);
  bind_widen(kernels);
  bind_input_map(kernels);
  bind_soft_cap(kernels);
  bind_kv_compact(kernels);
  bind_sampling(kernels);
  bind_engine_inputs(kernels);
}

}  // namespace edgellm
