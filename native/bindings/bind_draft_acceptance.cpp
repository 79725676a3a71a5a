// What the target keeps of a draft: accept_draft, draft_acceptance_workspace_bytes.
#include "bindings.hpp"
#include "edgellm/kernels/draft_acceptance.hpp"
#include "kernel_views.hpp"

namespace py = pybind11;

namespace edgellm {

void bind_draft_acceptance(py::module_& module) {
  module.attr("MAX_ACCEPTANCE_NODES") = kernels::kMaxAcceptanceNodes;
  module.def("draft_acceptance_workspace_bytes", &kernels::draft_acceptance_workspace_bytes, py::arg("max_sequences"),
             py::arg("max_nodes"));
  module.def(
      "accept_draft",
      [](const py::object& logits, const py::object& token_ids, const py::object& num_nodes, const py::object& rows,
         const py::object& scores, const py::object& paths, const py::object& path_lengths,
         const py::object& next_tokens, const py::object& workspace, const py::object& parents,
         const py::object& draft_probs, const py::object& row_tokens, std::uintptr_t stream, bool pdl) {
        const DeviceArray input(logits, "logits");
        const std::int64_t sequences = input.size(0), nodes = input.size(1), vocab = input.size(2);
        if (nodes < 1 || nodes > kernels::kMaxAcceptanceNodes) input.fail("must have 1 to 64 nodes");
        if (sequences < 1 || sequences > kernels::kMaxAcceptanceSequences) input.fail("must have 1 to 1024 sequences");
        if (!parents.is_none() && !draft_probs.is_none()) {
          throw std::invalid_argument("draft_probs belong to chains, which have no parents");
        }
        kernels::DraftAcceptanceArgs args;
        args.logits = input.as<const float>({sequences, nodes, vocab});
        args.draft_probs = optional<const float>(draft_probs, "draft_probs", {sequences, nodes, vocab});
        args.token_ids = required<const std::int32_t>(token_ids, "token_ids", {sequences, nodes});
        args.row_tokens = optional<const std::int32_t>(row_tokens, "row_tokens", {vocab});
        args.parents = optional<const std::int32_t>(parents, "parents", {sequences, nodes});
        args.num_nodes = required<const std::int32_t>(num_nodes, "num_nodes", {sequences});
        args.rows = reinterpret_cast<kernels::SamplingRow*>(
            required<std::uint8_t>(rows, "rows", {sequences, static_cast<std::int64_t>(sizeof(kernels::SamplingRow))}));
        args.scores = required<float>(scores, "scores", {sequences, nodes, vocab});
        args.paths = required<std::int32_t>(paths, "paths", {sequences, nodes});
        args.path_lengths = required<std::int32_t>(path_lengths, "path_lengths", {sequences});
        args.next_tokens = required<std::int32_t>(next_tokens, "next_tokens", {sequences});
        args.num_sequences = static_cast<int>(sequences);
        args.max_nodes = static_cast<int>(nodes);
        args.vocab = static_cast<int>(vocab);
        const DeviceArray scratch(workspace, "workspace");
        args.workspace = scratch.raw();
        const auto wanted = kernels::draft_acceptance_workspace_bytes(args.num_sequences, args.max_nodes);
        if (scratch.num_bytes() < static_cast<std::int64_t>(wanted)) scratch.fail("is too small");
        kernels::accept_draft_async(args, to_stream(stream), pdl);
      },
      py::arg("logits"), py::arg("token_ids"), py::arg("num_nodes"), py::arg("rows"), py::arg("scores"),
      py::arg("paths"), py::arg("path_lengths"), py::arg("next_tokens"), py::arg("workspace"),
      py::arg("parents") = py::none(), py::arg("draft_probs") = py::none(), py::arg("row_tokens") = py::none(),
      py::arg("stream") = 0, py::arg("pdl") = false);
}

}  // namespace edgellm
