// What every decoder has: steps, runs, prefixes. NumPy arrays in and out, the GIL released while the device works.
#include <pybind11/stl.h>

#include <memory>
#include <string>
#include <tuple>
#include <vector>

#include "bind_run.hpp"
#include "bindings.hpp"
#include "edgellm/token_loop.hpp"
#include "host_array.hpp"

namespace py = pybind11;

namespace edgellm {
namespace {

// The first rows of the decoder's logits, which its next step overwrites. They outlive it, and a larger buffer.
py::array logit_rows(const TokenLoop& decoder, int rows) {
  using Buffer = std::shared_ptr<const PinnedBuffer>;
  const py::capsule owner(new Buffer(decoder.logits_memory()),
                          [](void* buffer) { delete static_cast<Buffer*>(buffer); });
  return py::array_t<float>({py::ssize_t{rows}, py::ssize_t{decoder.config().num_rows()}}, decoder.logits(), owner);
}

// batch: (slot, token_ids, position, num_logits, adapter) a sequence.
py::array step(TokenLoop& decoder, const std::vector<std::tuple<int, Ints, int, int, int>>& batch) {
  std::vector<SequenceStep> steps;
  steps.reserve(batch.size());
  for (const auto& [slot, token_ids, position, num_logits, adapter] : batch) {
    steps.push_back({slot, span_of(token_ids), position, num_logits, adapter});
  }
  int rows = 0;
  {
    const py::gil_scoped_release release;
    rows = decoder.step(steps);
  }
  return logit_rows(decoder, rows);
}

}  // namespace

void bind_token_loop(py::module_& module) {
  py::class_<TokenLoop> loop(module, "TokenLoop", "Decoding on the current GPU, whatever computes the logits.");
  bind_run(module, loop);
  loop.def_property_readonly("config", [](const TokenLoop& self) { return self.config(); })
      .def_property_readonly("plan", [](const TokenLoop& self) { return plan_to_dict(self.plan()); })
      .def("step", &step, py::arg("batch"))
      .def("copy_prefix", &TokenLoop::copy_prefix, py::arg("source"), py::arg("target"), py::arg("length"),
           py::call_guard<py::gil_scoped_release>())
      .def(
          "save_prefix",
          [](TokenLoop& self, int slot, int length) {
            self.check_prefix(slot, length);  // before so many bytes are taken
            const std::size_t size = static_cast<std::size_t>(length) * self.config().kv_bytes_per_token();
            py::array_t<std::uint8_t> data(static_cast<py::ssize_t>(size));
            auto* host = reinterpret_cast<std::byte*>(data.mutable_data());
            const py::gil_scoped_release release;
            self.save_prefix(slot, length, host);
            return data;
          },
          py::arg("slot"), py::arg("length"))
      .def(
          "load_prefix",
          [](TokenLoop& self, int slot, const py::array_t<std::uint8_t, py::array::c_style>& data, int length) {
            const std::size_t size = static_cast<std::size_t>(length) * self.config().kv_bytes_per_token();
            if (static_cast<std::size_t>(data.nbytes()) != size) {
              throw std::invalid_argument("a prefix of " + std::to_string(length) + " tokens has " +
                                          std::to_string(size) + " bytes, not " + std::to_string(data.nbytes()));
            }
            const auto* host = reinterpret_cast<const std::byte*>(data.data());
            const py::gil_scoped_release release;
            self.load_prefix(slot, length, host);
          },
          py::arg("slot"), py::arg("data"), py::arg("length"))
      .def(
          "verify_tree",
          [](TokenLoop& decoder, int slot, int position, const Ints& token_ids, const Ints& parents, int adapter) {
            int rows = 0;
            {
              const py::gil_scoped_release release;
              rows = decoder.verify_tree(slot, position, span_of(token_ids), span_of(parents), adapter);
            }
            return logit_rows(decoder, rows);
          },
          py::arg("slot"), py::arg("position"), py::arg("token_ids"), py::arg("parents"), py::arg("adapter") = 0)
      .def(
          "accept_path",
          [](TokenLoop& decoder, int slot, int position, const Ints& nodes) {
            const py::gil_scoped_release release;
            decoder.accept_path(slot, position, span_of(nodes));
          },
          py::arg("slot"), py::arg("position"), py::arg("nodes"))
      .def("make_current", &TokenLoop::make_current,
           "Makes the decoder's GPU the thread's own, for as long as it lives.")
      .def("use_graphs", &TokenLoop::use_graphs, py::arg("use"));
}

}  // namespace edgellm
