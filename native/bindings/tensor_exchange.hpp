// A Tensor's way to and from other CUDA libraries without a copy: DLPack and __cuda_array_interface__.
#pragma once

#include <pybind11/numpy.h>

#include <cstdint>

#include "edgellm/tensor.hpp"

namespace edgellm {

// NumPy has neither bfloat16 nor float8: their bits cross as uint16 and uint8.
pybind11::dtype numpy_dtype(DType dtype);
pybind11::tuple to_tuple(const Shape& shape);

// A capsule over the memory of `self`, a Python Tensor, which it keeps alive. Whatever wrote the memory through
// Python has finished, so a consumer's stream has nothing to wait for. As the Python array API standard has them:
// stream (None, -1, 1, 2 or a handle; 0 is ambiguous), max_version, dl_device, copy. BufferError for what needs a copy.
pybind11::capsule to_dlpack(const pybind11::object& self, const pybind11::object& stream,
                            const pybind11::object& max_version, const pybind11::object& dl_device,
                            const pybind11::object& copy);
pybind11::tuple dlpack_device(const Tensor& tensor);

// Version 3. AttributeError for bfloat16, float8 and host memory, so that hasattr() says no.
pybind11::dict cuda_array_interface(const Tensor& tensor);

// A borrowing Python Tensor over another library's dense device array, which it keeps alive. `stream` waits for the
// work that the producer has put on its own: 1 is the legacy default stream, 2 the per-thread one, with -1 nothing
// waits.
pybind11::object tensor_view(const pybind11::object& array, std::intptr_t stream);

}  // namespace edgellm
