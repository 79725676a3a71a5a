// What module.cpp lists: one function a subject, each in the bind_*.cpp of its name.
#pragma once

#include <pybind11/pybind11.h>

namespace edgellm {

void bind_decoder(pybind11::module_& module);
void bind_device(pybind11::module_& module);
void bind_kernels(pybind11::module_& module);
void bind_tensor(pybind11::module_& module);
void bind_token_loop(pybind11::module_& module);
void bind_trt(pybind11::module_& module);

// What bind_kernels lists.
void bind_attention_decode(pybind11::module_& module);
void bind_attention_prefill(pybind11::module_& module);
void bind_attention_tree(pybind11::module_& module);
void bind_draft_acceptance(pybind11::module_& module);
void bind_embedding(pybind11::module_& module);
void bind_engine_inputs(pybind11::module_& module);
void bind_gemm_int4(pybind11::module_& module);
void bind_gemv(pybind11::module_& module);
void bind_input_map(pybind11::module_& module);
void bind_kv_compact(pybind11::module_& module);
void bind_products(pybind11::module_& module);
void bind_lora(pybind11::module_& module);
void bind_quantized(pybind11::module_& module);
void bind_rms_norm(pybind11::module_& module);
void bind_rope(pybind11::module_& module);
void bind_sampling(pybind11::module_& module);
void bind_soft_cap(pybind11::module_& module);
void bind_swiglu(pybind11::module_& module);
void bind_widen(pybind11::module_& module);

}  // namespace edgellm
