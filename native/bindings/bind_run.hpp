// The part of every decoder's binding that bind_run.cpp has.
#pragma once

#include <pybind11/pybind11.h>

#include "edgellm/token_loop.hpp"

namespace edgellm {

void bind_run(pybind11::module_& module, pybind11::class_<TokenLoop>& loop);

}  // namespace edgellm
