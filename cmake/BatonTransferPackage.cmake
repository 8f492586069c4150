# The transfer library alone, for other programs: `cmake --install <build> --component transfer --prefix <where>`.
#   include/baton/transfer.h, transfer_c.h    the two interfaces
#   include/baton/base/                       what transfer.h itself includes
#   lib/libbaton_transfer.a                   with what it needs of base in it
#   lib/cmake/BatonTransfer/, lib/pkgconfig/  for find_package() and pkg-config
include(GNUInstallDirs)
include(CMakePackageConfigHelpers)

# Both archives in one. metrics.cc stays out: transfer has its own statistics and needs no prometheus-cpp.
add_library(baton_transfer_package STATIC
  $<TARGET_OBJECTS:baton_transfer> $<FILTER:$<TARGET_OBJECTS:baton_base>,EXCLUDE,/metrics\\.cc>)
set_target_properties(baton_transfer_package PROPERTIES
  LINKER_LANGUAGE CXX OUTPUT_NAME baton_transfer EXPORT_NAME transfer
  ARCHIVE_OUTPUT_DIRECTORY ${CMAKE_CURRENT_BINARY_DIR}/package)
target_compile_features(baton_transfer_package INTERFACE cxx_std_20)
target_link_libraries(baton_transfer_package INTERFACE fmt::fmt Threads::Threads ${CMAKE_DL_LIBS})

# What is linked with a pkg-config module has to be found again by whoever uses the package.
set(BATON_TRANSFER_MODULES "")
get_target_property(libraries baton_transfer LINK_LIBRARIES)
foreach(library ${libraries})
  if(library MATCHES "^PkgConfig::(.*)$")
    target_link_libraries(baton_transfer_package INTERFACE ${library})
    list(APPEND BATON_TRANSFER_MODULES ${CMAKE_MATCH_1}:${${CMAKE_MATCH_1}_MODULE_NAME})
  endif()
endforeach()
list(TRANSFORM BATON_TRANSFER_MODULES REPLACE "^.*:" "" OUTPUT_VARIABLE BATON_TRANSFER_REQUIRES)
list(JOIN BATON_TRANSFER_REQUIRES " " BATON_TRANSFER_REQUIRES)

set(package_dir ${CMAKE_INSTALL_LIBDIR}/cmake/BatonTransfer)
install(TARGETS baton_transfer_package EXPORT BatonTransferTargets
  ARCHIVE DESTINATION ${CMAKE_INSTALL_LIBDIR} COMPONENT transfer
  INCLUDES DESTINATION ${CMAKE_INSTALL_INCLUDEDIR})
install(EXPORT BatonTransferTargets NAMESPACE Baton:: DESTINATION ${package_dir} COMPONENT transfer)
configure_package_config_file(${PROJECT_SOURCE_DIR}/cmake/BatonTransferConfig.cmake.in BatonTransferConfig.cmake
  INSTALL_DESTINATION ${package_dir} NO_SET_AND_CHECK_MACRO)
write_basic_package_version_file(BatonTransferConfigVersion.cmake COMPATIBILITY SameMinorVersion)
install(FILES ${CMAKE_CURRENT_BINARY_DIR}/BatonTransferConfig.cmake
              ${CMAKE_CURRENT_BINARY_DIR}/BatonTransferConfigVersion.cmake
  DESTINATION ${package_dir} COMPONENT transfer)

# pkg-config's prefix follows the file, so that the tree may be moved.
file(RELATIVE_PATH pc_to_prefix /${CMAKE_INSTALL_LIBDIR}/pkgconfig /)
string(REGEX REPLACE "/$" "" pc_to_prefix ${pc_to_prefix})
configure_file(${PROJECT_SOURCE_DIR}/cmake/baton-transfer.pc.in baton-transfer.pc @ONLY)
install(FILES ${CMAKE_CURRENT_BINARY_DIR}/baton-transfer.pc
  DESTINATION ${CMAKE_INSTALL_LIBDIR}/pkgconfig COMPONENT transfer)

install(CODE "
  set(source_dir \"${PROJECT_SOURCE_DIR}/src\")
  set(include_dir \"\$ENV{DESTDIR}\${CMAKE_INSTALL_PREFIX}/${CMAKE_INSTALL_INCLUDEDIR}\")
  include(\"${PROJECT_SOURCE_DIR}/cmake/InstallTransferHeaders.cmake\")" COMPONENT transfer)
