# Every outside library, found once. docs/dependencies.md says why each is here.

find_package(Threads REQUIRED)
find_package(PkgConfig REQUIRED)
find_package(fmt REQUIRED)
pkg_check_modules(LIBFABRIC REQUIRED IMPORTED_TARGET libfabric)
# Off by default: UCX 1.13 ends the whole process in situations that only bad luck brings about (docs/transfer.md).
option(BATON_UCX "UCX as a transport (experimental; needs libucx-dev)" OFF)
if(BATON_UCX)
  pkg_check_modules(UCX REQUIRED ucx)
endif()
if(BATON_TESTS)
  find_package(GTest REQUIRED)
  include(GoogleTest)
endif()
if(BATON_TRANSFER_ONLY)
  return()
endif()

find_package(Protobuf REQUIRED)
find_package(nlohmann_json REQUIRED)
find_package(simdjson REQUIRED)
find_package(CLI11 REQUIRED)
find_package(prometheus-cpp REQUIRED)
if(POLICY CMP0167)
  cmake_policy(SET CMP0167 NEW)  # Boost's own package file, not CMake's FindBoost
endif()
find_package(Boost 1.74 REQUIRED)  # Asio and Beast: headers only

pkg_check_modules(PCRE2 REQUIRED IMPORTED_TARGET libpcre2-8)
pkg_check_modules(UTF8PROC REQUIRED IMPORTED_TARGET libutf8proc)
pkg_check_modules(XXHASH REQUIRED IMPORTED_TARGET libxxhash)

# gRPC by hand: pkg-config takes half a minute to walk grpc++'s two hundred requirements, and gRPC's CMake package asks
# pkg-config for re2. We call grpc++, grpc and gpr; grpc++'s headers inline uses of absl::Mutex.
find_package(absl CONFIG REQUIRED)
find_path(GRPCPP_INCLUDE_DIR grpcpp/grpcpp.h REQUIRED)
find_library(GRPCPP_LIBRARY grpc++ REQUIRED)
find_library(GRPC_LIBRARY grpc REQUIRED)
find_library(GPR_LIBRARY gpr REQUIRED)
add_library(baton_grpcpp INTERFACE)
target_include_directories(baton_grpcpp SYSTEM INTERFACE ${GRPCPP_INCLUDE_DIR})
target_link_libraries(baton_grpcpp INTERFACE ${GRPCPP_LIBRARY} ${GRPC_LIBRARY} ${GPR_LIBRARY} absl::synchronization)

# Boost's headers for the libraries that use coroutines. 1.74 does not know that clang has C++20's.
add_library(baton_asio INTERFACE)
target_link_libraries(baton_asio INTERFACE Boost::boost)
target_compile_definitions(baton_asio INTERFACE
  $<$<CXX_COMPILER_ID:Clang>:BOOST_ASIO_HAS_CO_AWAIT> $<$<CXX_COMPILER_ID:Clang>:BOOST_ASIO_HAS_STD_COROUTINE>)
