# CUDA is optional when building and found at run time: nvcc compiles kernels to fatbins, which the libraries carry as
# bytes and hand to the driver. Nothing links to CUDA. -DBATON_CUDA=OFF leaves the kernels out, ON insists on nvcc.
set(BATON_CUDA AUTO CACHE STRING "Build the CUDA kernels: AUTO, ON or OFF")
set_property(CACHE BATON_CUDA PROPERTY STRINGS AUTO ON OFF)
set(BATON_NVCC "")
if(BATON_CUDA)
  find_program(NVCC_EXECUTABLE nvcc HINTS $ENV{CUDA_HOME}/bin $ENV{CUDA_PATH}/bin /usr/local/cuda/bin)
  if(NVCC_EXECUTABLE)
    set(BATON_NVCC ${NVCC_EXECUTABLE})
  elseif(NOT BATON_CUDA STREQUAL "AUTO")
    message(FATAL_ERROR "BATON_CUDA=${BATON_CUDA}, and there is no nvcc: set CUDA_HOME, or -DBATON_CUDA=OFF")
  endif()
  if(NOT BATON_NVCC)
    message(STATUS "No nvcc: built without CUDA kernels")
  endif()
endif()

# baton_fatbin(OUTPUT copy.fatbin SOURCE copy.cu DEPENDS a.h EMBED_IN driver.cc DEFINITION BATON_COPY_FATBIN)
#   Code for A100 and H100/H200, and PTX for what comes after; the source that embeds the file (.incbin) gets its path as
#   a string; one source may embed several. ARCHITECTURE 90a: code for that one alone. Nothing happens without nvcc.
function(baton_fatbin)
  cmake_parse_arguments(ARG "" "OUTPUT;SOURCE;EMBED_IN;DEFINITION;ARCHITECTURE" "DEPENDS" ${ARGN})
  if(NOT BATON_NVCC)
    return()
  endif()
  set(output ${CMAKE_CURRENT_BINARY_DIR}/${ARG_OUTPUT})
  set(source ${CMAKE_CURRENT_SOURCE_DIR}/${ARG_SOURCE})
  list(TRANSFORM ARG_DEPENDS PREPEND ${CMAKE_CURRENT_SOURCE_DIR}/)
  set(code -gencode arch=compute_80,code=sm_80 -gencode arch=compute_90,code=sm_90
    -gencode arch=compute_90,code=compute_90)
  if(ARG_ARCHITECTURE)
    set(code -gencode arch=compute_${ARG_ARCHITECTURE},code=sm_${ARG_ARCHITECTURE})
  endif()
  add_custom_command(OUTPUT ${output}
    COMMAND ${BATON_NVCC} -std=c++17 -O3 -fatbin -I${PROJECT_SOURCE_DIR}/src ${code} -o ${output} ${source}
    DEPENDS ${source} ${ARG_DEPENDS} COMMENT "nvcc ${ARG_SOURCE}" VERBATIM)
  set_property(SOURCE ${ARG_EMBED_IN} APPEND PROPERTY COMPILE_DEFINITIONS "${ARG_DEFINITION}=\"${output}\"")
  set_property(SOURCE ${ARG_EMBED_IN} APPEND PROPERTY OBJECT_DEPENDS ${output})
endfunction()
