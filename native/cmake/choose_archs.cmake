# Sets `archs`, the list of GPU architectures to compile for, `ptx`, the one whose PTX goes along ("" is none), and
# `gencode`, nvcc's options for them, out of EDGELLM_CUDA_ARCHS: names ("87" or "80 90a"), `all`, `native` (the GPUs that are here; an error without one), or
# empty: the GPUs that are here if there are any, else all.
execute_process(COMMAND "${CMAKE_CUDA_COMPILER}" --list-gpu-arch
  OUTPUT_VARIABLE known_archs OUTPUT_STRIP_TRAILING_WHITESPACE COMMAND_ERROR_IS_FATAL ANY)

set(archs "")
if(EDGELLM_CUDA_ARCHS MATCHES "^(native)?$")
  try_run(gpu_archs_result gpu_archs_compiled "${CMAKE_CURRENT_BINARY_DIR}/gpu_archs"
    "${CMAKE_CURRENT_LIST_DIR}/gpu_archs.cu" RUN_OUTPUT_VARIABLE gpu_archs)
  if(gpu_archs_compiled AND gpu_archs_result EQUAL 0 AND gpu_archs)
    string(REPLACE " " ";" gpu_archs "${gpu_archs}")
    foreach(arch ${gpu_archs})
      if(NOT known_archs MATCHES "compute_${arch}(\n|$)")  # all has PTX, which a newer GPU's driver compiles
        set(unknown "CUDA ${CMAKE_CUDA_COMPILER_VERSION} cannot compile for this machine's GPU (architecture ${arch})")
        if(EDGELLM_CUDA_ARCHS STREQUAL "native")
          message(FATAL_ERROR "edgellm_native: ${unknown}; install a newer CUDA toolkit, or use all")
        endif()
        message(STATUS "edgellm_native: ${unknown}; compiling for all that it knows")
        set(archs "")
        break()
      endif()
      string(REGEX REPLACE "^90$" "90a" arch "${arch}")
      list(APPEND archs ${arch})
    endforeach()
    list(REMOVE_DUPLICATES archs)
  elseif(EDGELLM_CUDA_ARCHS STREQUAL "native")
    message(FATAL_ERROR "edgellm_native: EDGELLM_CUDA_ARCHS is native, but CUDA sees no GPU here; name the robot's "
      "architecture instead (87 for a Jetson Orin), or use all")
  endif()
elseif(NOT EDGELLM_CUDA_ARCHS STREQUAL "all")
  string(REGEX REPLACE "[ ,;]+" ";" archs "${EDGELLM_CUDA_ARCHS}")
endif()
if(NOT archs)
  foreach(arch 80 87 89 90a 110 120)
    string(REGEX REPLACE "a$" "" plain "${arch}")
    if(known_archs MATCHES "compute_${plain}(\n|$)")
      list(APPEND archs ${arch})
    endif()
  endforeach()
endif()

set(gencode "")
foreach(arch ${archs})
  list(APPEND gencode "SHELL:-gencode=arch=compute_${arch},code=sm_${arch}")
endforeach()
# PTX for GPUs that are newer than this list; that of an `a` or `f` architecture runs nowhere else.
list(GET archs -1 ptx)
if(ptx MATCHES "[a-z]$")
  set(ptx "")
else()
  list(APPEND gencode "SHELL:-gencode=arch=compute_${ptx},code=compute_${ptx}")
endif()
