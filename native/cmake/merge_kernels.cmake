# Most of a small kernel file's time in a quick build is CUDA's headers, which are read once for each architecture: files
# that only instantiate kernels, and small ones, are compiled a few together, the constant that nearly all of those have
# under a name for each. merge_kernels(sources) replaces them in that list.
function(merge_kernels list_name)
  set(merged ${${list_name}})
  set(small embedding engine_inputs greedy input_map kv_compact lora lora_prefill quantized rms_norm rope sampling_counts
    soft_cap swiglu trial widen gemv gemv_choice attention_decode attention_tree)
  list(JOIN small "|" small)
  foreach(family "gemv_(bf16|fp16|fp8|int8|int4_one|int4_small)[a-z0-9_]*" "attention_decode_[0-9]+" "attention_tree_[0-9]+"
      "(${small})")
    set(files ${merged})
    list(FILTER files INCLUDE REGEX "/kernels/${family}\\.cu$")
    list(FILTER merged EXCLUDE REGEX "/kernels/${family}\\.cu$")
    string(REGEX MATCH "[a-z]+(_[a-z]+)?" stem "${family}")
    set(count 0)
    set(part 0)
    foreach(file ${files})
      math(EXPR part "${count} / 4")
      math(EXPR count "${count} + 1")
      get_filename_component(name "${file}" NAME_WE)
      string(APPEND text_${part}
        "#define kThreads kThreads_of_${name}\n#include \"${file}\"\n#undef kThreads\n")
    endforeach()
    foreach(index RANGE ${part})
      set(path "${CMAKE_CURRENT_BINARY_DIR}/kernels/${stem}_part_${index}.cu")
      file(CONFIGURE OUTPUT "${path}" CONTENT "${text_${index}}" @ONLY)
      list(APPEND merged "${path}")
      unset(text_${index})
    endforeach()
  endforeach()
  set(${list_name} ${merged} PARENT_SCOPE)
endfunction()
