# Sets CMAKE_CUDA_COMPILER for a package that goes without native/ where nvcc is missing or compiles nothing (only a part
# of the toolkit is installed: nvcc without the runtime's headers, say); empty then, with the reason as a message.
include("${CMAKE_CURRENT_LIST_DIR}/find_nvcc.cmake")
include(CheckLanguage)
if(EDGELLM_NVCC AND NOT DEFINED ENV{CUDACXX})
  set(ENV{CUDACXX} "${EDGELLM_NVCC}")
  unset(CMAKE_CUDA_COMPILER)  # check_language tries nothing that has a value
endif()
if(NOT CMAKE_CUDA_COMPILER)
  unset(CMAKE_CUDA_COMPILER CACHE)  # not found the last time, perhaps installed since
endif()
check_language(CUDA)
if(NOT CMAKE_CUDA_COMPILER AND EDGELLM_NVCC)
  message(WARNING "edgellm_ros: building without native/: ${EDGELLM_NVCC} does not compile an empty program; install the "
    "whole CUDA toolkit, then build again with --cmake-force-configure (its words: CMakeFiles/CMakeError.log or "
    "CMakeConfigureLog.yaml in the build directory)")
elseif(NOT CMAKE_CUDA_COMPILER)
  message(STATUS "edgellm_ros: no CUDA compiler found, building without native/")
endif()
