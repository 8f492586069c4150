# The objects that are compiled with the flags of an instruction set must not define weak symbols: inline functions
# and template instances that the linker may pick for the whole program (see cpu/isa.h).
# cmake -DNM=nm -DOBJECTS="a.o;b.o" -P check_isa_symbols.cmake
set(checked 0)
foreach(object IN LISTS OBJECTS)
  if(NOT object MATCHES "isa_avx")
    continue()
  endif()
  execute_process(COMMAND ${NM} -C --defined-only ${object} OUTPUT_VARIABLE symbols COMMAND_ERROR_IS_FATAL ANY)
  string(REGEX MATCHALL "[^\n]* [WVu] [^\n]*" weak "${symbols}")
  # The personality reference of exception tables is data, the same in every object.
  list(FILTER weak EXCLUDE REGEX "DW\\.ref\\.")
  if(weak)
    list(JOIN weak "\n" text)
    message(FATAL_ERROR "${object} defines weak symbols:\n${text}")
  endif()
  math(EXPR checked "${checked} + 1")
endforeach()
if(checked EQUAL 0)
  message(FATAL_ERROR "no object of an instruction set among: ${OBJECTS}")
endif()
