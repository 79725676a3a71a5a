# libedgellm_plugins.so: the project's kernels as TensorRT plugins, where NvInfer.h is found. It reuses the objects of
# the kernels in _native, and of what finds cuBLASLt, and links no TensorRT: the registry that loads it is the one it talks to.
option(EDGELLM_PLUGINS "Build the TensorRT plugin library where NvInfer.h is found" ON)
option(EDGELLM_TEST_DRIVERS "Build what the tests call the plugins with" OFF)
include("${CMAKE_CURRENT_LIST_DIR}/find_nvinfer.cmake")
if(NOT EDGELLM_PLUGINS OR NOT EDGELLM_NVINFER_INCLUDE_DIR)
  return()
endif()

file(GLOB plugin_sources CONFIGURE_DEPENDS
  "${CMAKE_CURRENT_SOURCE_DIR}/plugins/*.cpp" "${CMAKE_CURRENT_SOURCE_DIR}/plugins/*.cu")
set(kernel_objects "$<FILTER:$<TARGET_OBJECTS:_native>,INCLUDE,/kernels/|/src/cuda_try|/src/cublaslt>")
add_library(edgellm_plugins SHARED ${plugin_sources} "${kernel_objects}")
target_include_directories(edgellm_plugins PRIVATE "${CMAKE_CURRENT_SOURCE_DIR}/include")
target_include_directories(edgellm_plugins SYSTEM PRIVATE "${EDGELLM_NVINFER_INCLUDE_DIR}")
target_compile_features(edgellm_plugins PRIVATE cxx_std_20)
get_target_property(native_options _native COMPILE_OPTIONS)
target_compile_options(edgellm_plugins PRIVATE "${native_options}")
set_target_properties(edgellm_plugins PROPERTIES
  CUDA_RUNTIME_LIBRARY Static CXX_VISIBILITY_PRESET hidden CUDA_VISIBILITY_PRESET hidden)
target_link_libraries(edgellm_plugins PRIVATE CUDA::cudart_static ${CMAKE_DL_LIBS})
target_link_options(edgellm_plugins PRIVATE -Wl,--no-undefined -Wl,--exclude-libs,ALL)

set(plugin_targets edgellm_plugins)
if(EDGELLM_TEST_DRIVERS)
  add_library(edgellm_plugin_test_driver SHARED "${CMAKE_CURRENT_SOURCE_DIR}/plugins/test_driver/test_driver.cpp")
  target_include_directories(edgellm_plugin_test_driver SYSTEM PRIVATE
    "${EDGELLM_NVINFER_INCLUDE_DIR}" ${CUDAToolkit_INCLUDE_DIRS})
  target_compile_features(edgellm_plugin_test_driver PRIVATE cxx_std_20)
  target_compile_options(edgellm_plugin_test_driver PRIVATE ${cxx_warnings})
  target_link_libraries(edgellm_plugin_test_driver PRIVATE ${CMAKE_DL_LIBS})
  target_link_options(edgellm_plugin_test_driver PRIVATE -Wl,--no-undefined)
  list(APPEND plugin_targets edgellm_plugin_test_driver)
endif()
if(CMAKE_PROJECT_NAME STREQUAL "edgellm_ros" AND DEFINED PYTHON_INSTALL_DIR)
  install(TARGETS edgellm_plugins DESTINATION "${PYTHON_INSTALL_DIR}/edgellm_ros")
else()
  set_target_properties(${plugin_targets} PROPERTIES LIBRARY_OUTPUT_DIRECTORY "${EDGELLM_OUTPUT_DIR}")
endif()
