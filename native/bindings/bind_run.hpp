// The part of the decoder's binding that bind_run.cpp has.
#pragma once

#include <pybind11/pybind11.h>

#include "edgellm/decoder.hpp"

namespace edgellm {

void bind_run(pybind11::module_& module, pybind11::class_<Decoder>& decoder);

}  // namespace edgellm
