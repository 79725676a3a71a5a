// Embedding lookup by ids on the device, and embeddings computed elsewhere: embedding, embeddings_from_bf16.
#include "bindings.hpp"
#include "edgellm/kernels/embedding.hpp"
#include "kernel_views.hpp"

namespace py = pybind11;

namespace edgellm {

void bind_embedding(py::module_& module) {
  module.def(
      "embedding",
      [](const py::tuple& table, const py::object& token_ids, const py::object& residual,
         const py::object& residual_bf16, float scale, std::uintptr_t stream, bool pdl) {
        const kernels::WeightView view = WeightTuple(table).view;
        if (view.format != kernels::WeightFormat::bf16 && view.format != kernels::WeightFormat::fp16 &&
            view.format != kernels::WeightFormat::int8) {
          throw std::invalid_argument("an embedding table is bf16, fp16 or int8");
        }
        const DeviceArray ids(token_ids, "token_ids");
        const std::int64_t n = ids.size(0);
        kernels::embedding_async(view, ids.as<const std::int32_t>({n}), static_cast<int>(n), scale,
                                 required<float>(residual, "residual", {n, view.cols}),
                                 required<__nv_bfloat16>(residual_bf16, "residual_bf16", {n, view.cols}),
                                 to_stream(stream), pdl);
      },
      py::arg("table"), py::arg("token_ids"), py::arg("residual"), py::arg("residual_bf16"), py::arg("scale") = 1.0F,
      py::arg("stream") = 0, py::arg("pdl") = false);
  module.def(
      "embeddings_from_bf16",
      [](const py::object& embeddings, const py::object& residual, const py::object& residual_bf16,
         std::uintptr_t stream, bool pdl) {
        const DeviceArray from(embeddings, "embeddings");
        const std::int64_t n = from.size(0), hidden = from.size(1);
        kernels::embeddings_from_bf16_async(
            from.as<const __nv_bfloat16>({n, hidden}), static_cast<int>(n), static_cast<int>(hidden),
            required<float>(residual, "residual", {n, hidden}),
            required<__nv_bfloat16>(residual_bf16, "residual_bf16", {n, hidden}), to_stream(stream), pdl);
      },
      py::arg("embeddings"), py::arg("residual"), py::arg("residual_bf16"), py::arg("stream") = 0,
      py::arg("pdl") = false);
}

}  // namespace edgellm
