// TensorRT: which library is here, what an engine says of itself, and decoding with one.
#include <pybind11/stl.h>

#include <string>
#include <tuple>
#include <vector>

#include "bindings.hpp"
#include "edgellm/trt_decoder.hpp"
#include "edgellm/trt_engine.hpp"
#include "edgellm/trt_library.hpp"
#include "host_array.hpp"

namespace py = pybind11;

namespace edgellm {
namespace {

py::tuple binding_tuple(const TrtBinding& binding) {
  return py::make_tuple(binding.name, binding.is_input, binding.dtype, binding.dims, binding.on_host, binding.is_linear,
                        binding.profiles);
}

// tensors: (name, rank, bytes in what the engine computes in) of those that are not empty.
void load_adapter(
    TrtDecoder& decoder, int index,
    const std::vector<std::tuple<std::string, int, py::array_t<std::uint8_t, py::array::c_style>>>& tensors) {
  std::vector<TrtLoraTensor> adapter;
  adapter.reserve(tensors.size());
  for (const auto& [name, rank, data] : tensors) {
    adapter.push_back({name, rank, std::as_bytes(std::span(data.data(), static_cast<std::size_t>(data.size())))});
  }
  const py::gil_scoped_release release;
  decoder.load_adapter(index, adapter);
}

void load_embedding(TrtDecoder& decoder, const py::array& values, const py::object& scale) {
  const HostTensor host = host_tensor("embed.weight", values);
  HostTensor host_scale;
  if (!scale.is_none()) host_scale = host_tensor("embed.scale", scale.cast<py::array>());
  const py::gil_scoped_release release;
  decoder.load_embedding(host, scale.is_none() ? nullptr : &host_scale);
}

// (name, role, layer, dims, max_rank, window)
using TensorTuple = std::tuple<std::string, std::string, int, std::vector<std::int64_t>, int, int>;

void set_tensors(TrtDecoderConfig& config, const std::vector<TensorTuple>& tensors) {
  config.tensors.clear();
  for (const auto& [name, role, layer, dims, max_rank, window] : tensors) {
    config.tensors.push_back({name, trt_role_from_name(role), layer, dims, max_rank, window});
  }
}

void bind_trt_decoder(py::module_& module) {
  py::class_<TrtDecoderConfig>(module, "TrtDecoderConfig", "What an engine is as a decoder, and how much it may hold.")
      .def(py::init<>())
      .def_readwrite("loop", &TrtDecoderConfig::loop)
      .def_readwrite("is_bf16", &TrtDecoderConfig::is_bf16)
      .def_readwrite("engine_capacity", &TrtDecoderConfig::engine_capacity)
      .def_readwrite("max_batch", &TrtDecoderConfig::max_batch)
      .def_readwrite("decode_tokens", &TrtDecoderConfig::decode_tokens)
      .def_readwrite("max_logits", &TrtDecoderConfig::max_logits)
      .def("set_tensors", &set_tensors, py::arg("tensors"), "(name, role, layer, dims, max_rank, window) of each.")
      .def("check", &TrtDecoderConfig::check, "ValueError that names what cannot be.");
  module.def(
      "plan_trt_memory",
      [](const TrtDecoderConfig& config, std::size_t context_bytes) {
        return plan_to_dict(plan_trt_memory(config, context_bytes));
      },
      py::arg("config"), py::arg("context_bytes"),
      "Bytes of device memory by purpose, and their total, beside TensorRT's own; takes none.");
  py::class_<TrtDecoder, TokenLoop>(module, "TrtDecoder", "A decoder whose logits a TensorRT engine computes.")
      .def(py::init<TrtEngine&, TrtDecoderConfig>(), py::arg("engine"), py::arg("config"), py::keep_alive<1, 2>(),
           py::call_guard<py::gil_scoped_release>())
      .def("load_embedding", &load_embedding, py::arg("values"), py::arg("scale") = py::none())
      .def(
          "load_vocab_map",
          [](TrtDecoder& decoder, const py::array& token_ids) {
            const HostTensor host = host_tensor("vocab_map", token_ids);
            const py::gil_scoped_release release;
            decoder.load_vocab_map(host);
          },
          py::arg("token_ids"))
      .def("finish_load", &TrtDecoder::finish_load, py::call_guard<py::gil_scoped_release>())
      .def("load_adapter", &load_adapter, py::arg("index"), py::arg("tensors"))
      .def("unload_adapter", &TrtDecoder::unload_adapter, py::arg("index"), py::call_guard<py::gil_scoped_release>())
      .def_property_readonly("num_contexts_and_graphs", &TrtDecoder::num_contexts_and_graphs);
}

}  // namespace

void bind_trt(py::module_& module) {
  py::register_exception_translator([](std::exception_ptr pointer) {
    try {
      if (pointer) std::rethrow_exception(pointer);
    } catch (const TrtError& error) {
      const py::module_ errors = py::module_::import("edgellm_ros.errors");
      PyErr_SetString(errors.attr("UnsupportedError").ptr(), error.what());
    }
  });
  module.attr("TENSORRT_HEADERS") = tensorrt_header_version();  // "10.14"; "": compiled without NvInfer.h
  module.def(
      "find_tensorrt",
      [](const std::vector<std::string>& candidates) {
        const TrtLibraryInfo info = find_tensorrt(candidates);
        return py::make_tuple(info.path, py::tuple(py::cast(info.version)), info.reason);
      },
      py::arg("candidates"),
      "(path, version, why it cannot be used) of the first library that loads; needs no GPU. The path is empty when "
      "none loads.");
  py::class_<TrtEngine>(module, "TrtEngine", "A deserialised TensorRT engine; UnsupportedError says why there is none.")
      .def(py::init<const std::string&, const std::vector<std::string>&, const std::string&>(), py::arg("path"),
           py::arg("candidates"), py::arg("plugins") = "", py::call_guard<py::gil_scoped_release>())
      .def_property_readonly("library", [](const TrtEngine& self) { return self.library().path; })
      .def_property_readonly("version",
                             [](const TrtEngine& self) { return py::tuple(py::cast(self.library().version)); })
      .def_property_readonly("num_profiles", &TrtEngine::num_profiles)
      .def_property_readonly("context_bytes", &TrtEngine::context_bytes)
      .def_property_readonly(
          "bindings",
          [](const TrtEngine& self) {
            py::list found;
            for (const TrtBinding& binding : self.bindings()) found.append(binding_tuple(binding));
            return found;
          },
          "(name, is_input, dtype, dims, on_host, is_linear, [[min, best, max] a profile]) of every input and output.")
      .def("take_log", &TrtEngine::take_log, "[(severity, text)] that TensorRT logged since the last call.");
  bind_trt_decoder(module);
}

}  // namespace edgellm
