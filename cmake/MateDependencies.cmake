# Finds what the build needs:
#   MATE_DLPACK_INCLUDE_DIR   the folder that holds dlpack/dlpack.h, 1.1 or newer (the first with float8_e4m3fn)
#   OpenMP::OpenMP_CXX        with MATE_OPENMP, where the compiler has OpenMP
#   tvm_ffi::shared           with MATE_BUILD_PYTHON

find_package(Python QUIET COMPONENTS Interpreter)

# The Python package apache-tvm-ffi brings dlpack.h and a CMake package, and says where they lie.
function(mate_tvm_ffi_path option result)
  set(path "")
  if(Python_Interpreter_FOUND)
    execute_process(
      COMMAND ${Python_EXECUTABLE} -m tvm_ffi.config ${option}
      OUTPUT_VARIABLE path
      OUTPUT_STRIP_TRAILING_WHITESPACE ERROR_QUIET)
  endif()
  set(${result} "${path}" PARENT_SCOPE)
endfunction()

# Looked for afresh by each configuration, since a Python build environment may have moved; a path given with -D stays.
mate_tvm_ffi_path(--dlpack-includedir tvm_ffi_dlpack_dir)
find_path(MATE_DLPACK_INCLUDE_DIR dlpack/dlpack.h HINTS ${tvm_ffi_dlpack_dir} NO_CACHE)
if(NOT MATE_DLPACK_INCLUDE_DIR)
  message(FATAL_ERROR "dlpack/dlpack.h not found: install the Python package apache-tvm-ffi, which brings it, "
                      "or pass -DMATE_DLPACK_INCLUDE_DIR=<folder that holds dlpack/dlpack.h>")
endif()
file(STRINGS ${MATE_DLPACK_INCLUDE_DIR}/dlpack/dlpack.h dlpack_version_lines
     REGEX "#define DLPACK_(MAJOR|MINOR)_VERSION [0-9]+")
string(REGEX REPLACE "[^;0-9]" "" dlpack_version "${dlpack_version_lines}")
string(REPLACE ";" "." dlpack_version "${dlpack_version}")
if(NOT dlpack_version VERSION_GREATER_EQUAL 1.1)
  message(FATAL_ERROR "${MATE_DLPACK_INCLUDE_DIR}/dlpack/dlpack.h must be DLPack 1.1 or newer, got "
                      "\"${dlpack_version}\"")
endif()

if(MATE_OPENMP)
  find_package(OpenMP COMPONENTS CXX)
  if(NOT OpenMP_CXX_FOUND)
    message(WARNING "The compiler has no OpenMP: the CPU backend will run on one thread")
  endif()
endif()

if(MATE_BUILD_PYTHON)
  mate_tvm_ffi_path(--cmakedir tvm_ffi_cmake_dir)
  find_package(tvm_ffi CONFIG REQUIRED HINTS ${tvm_ffi_cmake_dir})
endif()
