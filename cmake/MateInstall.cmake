# `cmake --install`: headers, library and a CMake package, so that users write
#   find_package(mate REQUIRED)
#   target_link_libraries(app PRIVATE mate::mate)

include(CMakePackageConfigHelpers)

set(mate_package_dir ${CMAKE_INSTALL_LIBDIR}/cmake/mate)

install(TARGETS mate EXPORT mateTargets COMPONENT development FILE_SET HEADERS COMPONENT development)
# The public headers use DLPack's types.
install(FILES ${MATE_DLPACK_INCLUDE_DIR}/dlpack/dlpack.h DESTINATION ${CMAKE_INSTALL_INCLUDEDIR}/dlpack
        COMPONENT development)
install(EXPORT mateTargets NAMESPACE mate:: DESTINATION ${mate_package_dir} COMPONENT development)

# A static library hands its own dependency on to what links it.
set(mate_needs_openmp OFF)
if(NOT BUILD_SHARED_LIBS AND TARGET OpenMP::OpenMP_CXX)
  set(mate_needs_openmp ON)
endif()
configure_package_config_file(cmake/mateConfig.cmake.in ${PROJECT_BINARY_DIR}/mateConfig.cmake
                              INSTALL_DESTINATION ${mate_package_dir})
write_basic_package_version_file(${PROJECT_BINARY_DIR}/mateConfigVersion.cmake COMPATIBILITY SameMinorVersion)
install(FILES ${PROJECT_BINARY_DIR}/mateConfig.cmake ${PROJECT_BINARY_DIR}/mateConfigVersion.cmake
        DESTINATION ${mate_package_dir} COMPONENT development)
