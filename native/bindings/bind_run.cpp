// Runs of the decoder: tokens that are drawn on the device, read one step behind.
#include "bind_run.hpp"

#include <pybind11/numpy.h>
#include <pybind11/stl.h>

#include <string>
#include <tuple>
#include <vector>

namespace py = pybind11;

namespace edgellm {
namespace {

using Ints = py::array_t<std::int32_t, py::array::c_style | py::array::forcecast>;
using Floats = py::array_t<float, py::array::c_style | py::array::forcecast>;
using Words = py::array_t<std::uint32_t, py::array::c_style>;
using kernels::SamplingRow;

template <class Array>
auto span_of(const Array& array) {
  return std::span(array.data(), static_cast<std::size_t>(array.size()));
}

SamplingRow sampling_row(std::uint64_t seed, float temperature, int top_k, float top_p, float min_p, int draw_index,
                         float repetition_penalty, float presence_penalty, float frequency_penalty, int num_top,
                         bool use_mask) {
  SamplingRow row{};
  row.seed = seed;
  row.temperature = temperature;
  row.top_p = top_p;
  row.min_p = min_p;
  row.repetition_penalty = repetition_penalty;
  row.presence_penalty = presence_penalty;
  row.frequency_penalty = frequency_penalty;
  row.top_k = top_k;
  row.draw_index = draw_index;
  row.use_mask = use_mask ? 1 : 0;
  row.num_top = num_top;
  return row;
}

// (slot, position, token_id, row, prompt_ids, answer_ids, bias_ids, bias_values, adapter)
using SequenceTuple = std::tuple<int, int, std::int32_t, SamplingRow, Ints, Ints, Ints, Floats, int>;

void start_run(TokenLoop& decoder, const std::vector<SequenceTuple>& sequences) {
  std::vector<RunSequence> run;
  run.reserve(sequences.size());
  for (const auto& [slot, position, token, row, prompt, answer, bias_ids, bias_values, adapter] : sequences) {
    run.push_back({slot, position, token, row, span_of(prompt), span_of(answer), span_of(bias_ids),
                   span_of(bias_values), adapter});
  }
  const py::gil_scoped_release release;
  decoder.start_run(run);
}

// (logprob, [(token id, logprob), …])
py::tuple logprobs_tuple(const kernels::TokenLogprobs& found) {
  py::list top;
  for (int i = 0; i < found.num_top; ++i) top.append(py::make_tuple(found.top_ids[i], found.top_logprobs[i]));
  return py::make_tuple(found.logprob, top);
}

py::tuple read_run_step(TokenLoop& decoder) {
  RunStep step;
  {
    const py::gil_scoped_release release;
    step = decoder.read_run_step();
  }
  py::list tokens;
  py::list logprobs;
  for (std::size_t i = 0; i < step.tokens.size(); ++i) {
    tokens.append(step.tokens[i]);
    if (step.logprobs[i] == nullptr) {
      logprobs.append(py::none());
    } else {
      logprobs.append(logprobs_tuple(*step.logprobs[i]));
    }
  }
  return py::make_tuple(tokens, logprobs);
}

template <typename T>
py::array_t<T> to_array(const std::vector<T>& values) {
  return py::array_t<T>(static_cast<py::ssize_t>(values.size()), values.data());
}

}  // namespace

void bind_run(py::module_& module, py::class_<TokenLoop>& loop) {
  module.attr("MAX_BATCH") = kMaxBatch;
  module.attr("MAX_BIAS") = kMaxBias;
  module.attr("MAX_TOP_LOGPROBS") = kernels::kMaxTopLogprobs;
  py::class_<SamplingRow>(module, "SamplingRow", "How one sequence of a run draws its tokens.")
      .def(py::init(&sampling_row), py::arg("seed") = 0, py::arg("temperature") = 0.0F, py::arg("top_k") = 0,
           py::arg("top_p") = 1.0F, py::arg("min_p") = 0.0F, py::arg("draw_index") = 0,
           py::arg("repetition_penalty") = 1.0F, py::arg("presence_penalty") = 0.0F,
           py::arg("frequency_penalty") = 0.0F, py::arg("num_top") = -1, py::arg("use_mask") = false);
  loop.def("start_run", &start_run, py::arg("sequences"),
           "(slot, position, token_id, row, prompt_ids, answer_ids, bias_ids, bias_values, adapter) a sequence; with a "
           "cut head all ids but token_id are rows of the head.")
      .def("launch_run_step_async", &TokenLoop::launch_run_step_async, py::call_guard<py::gil_scoped_release>())
      .def("read_run_step", &read_run_step,
           "(tokens, logprobs), one a sequence: a token is -1 where the logits were not finite; logprobs are None or "
           "(logprob, [(token id, logprob), ...]).")
      .def(
          "set_run_mask_async",
          [](TokenLoop& self, int index, const Words& words) { self.set_run_mask_async(index, span_of(words)); },
          py::arg("index"), py::arg("words"), "(rows of the head + 31) // 32 words uint32; a bit set allows a token.")
      .def(
          "decode_tokens",
          [](TokenLoop& self, const Ints& slots, const Ints& positions, const Ints& token_ids, int num_steps,
             const std::vector<SamplingRow>& rows, const Ints& adapters) {
            std::vector<std::int32_t> tokens;
            {
              const py::gil_scoped_release release;
              tokens = self.decode_tokens(span_of(slots), span_of(positions), span_of(token_ids), num_steps, rows,
                                          span_of(adapters));
            }
            return to_array(tokens).reshape({static_cast<py::ssize_t>(num_steps), slots.size()});
          },
          py::arg("slots"), py::arg("positions"), py::arg("token_ids"), py::arg("num_steps"),
          py::arg("sampling") = std::vector<SamplingRow>(), py::arg("adapters") = Ints(0),
          "(num_steps, batch) tokens, each fed to the next step on the device; greedy without sampling rows.")
      .def(
          "time_run",
          [](TokenLoop& self, const Ints& slots, const Ints& positions, const Ints& token_ids, int num_steps,
             const std::vector<SamplingRow>& rows, const Ints& adapters) {
            const py::gil_scoped_release release;
            return self.time_run(span_of(slots), span_of(positions), span_of(token_ids), num_steps, rows,
                                 span_of(adapters));
          },
          py::arg("slots"), py::arg("positions"), py::arg("token_ids"), py::arg("num_steps"),
          py::arg("sampling") = std::vector<SamplingRow>(), py::arg("adapters") = Ints(0),
          "Milliseconds of each step, on the device.");
}

}  // namespace edgellm
