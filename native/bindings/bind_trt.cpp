// TensorRT: which library is here, and what an engine says of itself.
#include <pybind11/stl.h>

#include "bindings.hpp"
#include "edgellm/trt_engine.hpp"
#include "edgellm/trt_library.hpp"

namespace py = pybind11;

namespace edgellm {
namespace {

py::tuple binding_tuple(const TrtBinding& binding) {
  return py::make_tuple(binding.name, binding.is_input, binding.dtype, binding.dims, binding.on_host, binding.is_linear,
                        binding.profiles);
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
      .def(py::init<const std::string&, const std::vector<std::string>&>(), py::arg("path"), py::arg("candidates"),
           py::call_guard<py::gil_scoped_release>())
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
}

}  // namespace edgellm
