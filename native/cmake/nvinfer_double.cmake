# libnvinfer_double.so: a test double of libnvinfer (nvinfer_double/), and the program that drives it through TensorRT's
# own headers. Never installed and in no wheel. It reuses the objects of _native's kernels and decoder.
option(EDGELLM_NVINFER_DOUBLE "Build the test double of libnvinfer where NvInfer.h is found" OFF)
set(EDGELLM_NVINFER_DOUBLE_DIR "${CMAKE_CURRENT_SOURCE_DIR}/../build/nvinfer_double" CACHE PATH "Where it goes")
if(NOT EDGELLM_NVINFER_DOUBLE)
  return()
endif()
if(NOT EDGELLM_NVINFER_INCLUDE_DIR)
  message(STATUS "edgellm_native: no NvInfer.h, so no double of libnvinfer")
  return()
endif()
# Its classes have every function of the headers' classes, which are others in every version.
file(STRINGS "${EDGELLM_NVINFER_INCLUDE_DIR}/NvInferVersion.h" double_version
  REGEX "#define (TRT|NV_TENSORRT)_(MAJOR|MINOR)(_ENTERPRISE)? +[0-9]+")
string(REGEX REPLACE "[^0-9;]+" "" double_version "${double_version}")
list(JOIN double_version "." double_version)
if(NOT double_version STREQUAL "10.14")
  message(STATUS "edgellm_native: NvInfer.h is of ${double_version}, so no double of libnvinfer, which stands for 10.14")
  return()
endif()

file(GLOB double_sources CONFIGURE_DEPENDS
  "${CMAKE_CURRENT_SOURCE_DIR}/nvinfer_double/*.cpp" "${CMAKE_CURRENT_SOURCE_DIR}/nvinfer_double/*.cu")
add_library(nvinfer_double SHARED ${double_sources} "$<FILTER:$<TARGET_OBJECTS:_native>,EXCLUDE,/bindings/>")
target_include_directories(nvinfer_double PRIVATE "${CMAKE_CURRENT_SOURCE_DIR}/include")
target_include_directories(nvinfer_double SYSTEM PRIVATE "${EDGELLM_NVINFER_INCLUDE_DIR}")
target_compile_features(nvinfer_double PRIVATE cxx_std_20)
get_target_property(native_options _native COMPILE_OPTIONS)
target_compile_options(nvinfer_double PRIVATE "${native_options}")
set_target_properties(nvinfer_double PROPERTIES
  CUDA_RUNTIME_LIBRARY Static CXX_VISIBILITY_PRESET hidden CUDA_VISIBILITY_PRESET hidden
  LIBRARY_OUTPUT_DIRECTORY "${EDGELLM_NVINFER_DOUBLE_DIR}")
target_link_libraries(nvinfer_double PRIVATE CUDA::cudart_static ${CMAKE_DL_LIBS})
target_link_options(nvinfer_double PRIVATE -Wl,--no-undefined
  "-Wl,--version-script=${CMAKE_CURRENT_SOURCE_DIR}/nvinfer_double/exports.map")

# Compiled against NvInfer.h alone: nothing of the double's own.
add_executable(nvinfer_double_driver "${CMAKE_CURRENT_SOURCE_DIR}/nvinfer_double/driver/driver.cpp")
target_include_directories(nvinfer_double_driver SYSTEM PRIVATE
  "${EDGELLM_NVINFER_INCLUDE_DIR}" ${CUDAToolkit_INCLUDE_DIRS})
target_compile_features(nvinfer_double_driver PRIVATE cxx_std_20)
target_compile_options(nvinfer_double_driver PRIVATE ${cxx_warnings})
target_link_libraries(nvinfer_double_driver PRIVATE CUDA::cudart_static ${CMAKE_DL_LIBS})
set_target_properties(nvinfer_double_driver PROPERTIES RUNTIME_OUTPUT_DIRECTORY "${EDGELLM_NVINFER_DOUBLE_DIR}")
