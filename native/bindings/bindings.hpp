// What module.cpp lists: one function a subject, each in the bind_*.cpp of its name.
#pragma once

#include <pybind11/pybind11.h>

namespace edgellm {

void bind_decoder(pybind11::module_& module);
void bind_device(pybind11::module_& module);
void bind_tensor(pybind11::module_& module);

}  // namespace edgellm
