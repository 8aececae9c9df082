# What CUDA code is compiled for where nobody has said it. Every architecture takes most of a minute of a core, and pip
# shows nothing while it builds: so it is compiled for the GPUs of this machine, and where none is seen, for few.

# Sets `result` to the architectures, as CMake names them, and `reason` to why these.
function(kdejsd_cuda_architectures nvcc result reason)
  execute_process(COMMAND "${nvcc}" --list-gpu-arch OUTPUT_VARIABLE known ERROR_QUIET)
  string(REGEX MATCHALL "[0-9]+" known "${known}")
  # All GPUs of the machine, whatever CUDA_VISIBLE_DEVICES says now.
  execute_process(COMMAND nvidia-smi --query-gpu=compute_cap --format=csv,noheader
                  OUTPUT_VARIABLE capabilities ERROR_QUIET)
  string(REGEX MATCHALL "(^|\n)[0-9]+\\.[0-9]" found "${capabilities}")
  string(REGEX REPLACE "[.\n]" "" found "${found}")
  list(REMOVE_DUPLICATES found)
  list(SORT found COMPARE NATURAL)

  set(is_known ON)
  foreach(architecture IN LISTS found)
    if(architecture LESS 80 OR NOT architecture IN_LIST known)
      set(is_known OFF)
    endif()
  endforeach()
  if(found AND is_known)
    set(why "those of the GPUs here")
    list(TRANSFORM found APPEND -real)
    string(REGEX REPLACE "-real$" "" found "${found}") # the last as PTX too: later devices compile it when they load
  else()
    set(why "no GPU is seen here that this nvcc can compile them for")
    # Devices 8.0 to 8.9 run the first, 9.0 the second; later ones compile the second's PTX when they load.
    set(found 80-real 90)
  endif()
  set(${result} "${found}" PARENT_SCOPE)
  set(${reason} "${why}" PARENT_SCOPE)
endfunction()
