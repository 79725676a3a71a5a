# Finds nvcc where CMake does not look by itself: a Jetson has it in /usr/local/cuda/bin, outside PATH.
if(NOT CMAKE_CUDA_COMPILER AND NOT DEFINED ENV{CUDACXX})
  find_program(EDGELLM_NVCC nvcc HINTS ENV CUDA_HOME ENV CUDA_PATH PATH_SUFFIXES bin PATHS /usr/local/cuda/bin)
  if(EDGELLM_NVCC)
    set(CMAKE_CUDA_COMPILER "${EDGELLM_NVCC}")
  endif()
endif()
