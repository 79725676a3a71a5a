# Sets EDGELLM_NVINFER_INCLUDE_DIR, where TensorRT's NvInfer.h is, and EDGELLM_NVINFER_LIBRARY, a runtime library to
# link with; each is NOTFOUND where there is none. Looked for in TENSORRT_ROOT, then where JetPack and NVIDIA's packages
# put them, then in wheels of the Python environment or in PYTHONPATH, which have the headers of 10.14 and the lean
# runtime of 10.15.
execute_process(COMMAND "${Python3_EXECUTABLE}" -c
  "import site, sys, sysconfig; roots = {*site.getsitepackages(), sysconfig.get_paths()['purelib'], *sys.path} - {''}; \
print(';'.join(sorted(roots)))"
  OUTPUT_VARIABLE edgellm_site_packages OUTPUT_STRIP_TRAILING_WHITESPACE ERROR_QUIET)
set(edgellm_wheel_includes "")
set(edgellm_wheel_libraries "")
foreach(root ${edgellm_site_packages})
  list(APPEND edgellm_wheel_includes "${root}/kernel_lens/include/tensorrt")
  list(APPEND edgellm_wheel_libraries "${root}/tensorrt_lean_libs")
endforeach()
set(edgellm_tensorrt_roots "${TENSORRT_ROOT}" "$ENV{TENSORRT_ROOT}" /usr/local/tensorrt)
list(REMOVE_ITEM edgellm_tensorrt_roots "")
find_path(EDGELLM_NVINFER_INCLUDE_DIR NvInfer.h
  HINTS ${edgellm_tensorrt_roots} PATH_SUFFIXES include
  PATHS /usr/include/${CMAKE_SYSTEM_PROCESSOR}-linux-gnu ${edgellm_wheel_includes})
find_library(EDGELLM_NVINFER_LIBRARY
  NAMES nvinfer libnvinfer.so.10 nvinfer_lean libnvinfer_lean.so.10
  HINTS ${edgellm_tensorrt_roots} PATH_SUFFIXES lib lib64
  PATHS /usr/lib/${CMAKE_SYSTEM_PROCESSOR}-linux-gnu ${edgellm_wheel_libraries})
if(EDGELLM_NVINFER_INCLUDE_DIR)
  message(STATUS "edgellm_native: NvInfer.h in ${EDGELLM_NVINFER_INCLUDE_DIR}, library ${EDGELLM_NVINFER_LIBRARY}")
else()
  message(STATUS "edgellm_native: no NvInfer.h; TENSORRT_ROOT may say where it is")
endif()
