# Installs the build of BUILD_DIR to a scratch prefix, then builds and runs EXAMPLES_DIR against that prefix alone.
function(run)
  execute_process(COMMAND ${ARGV} OUTPUT_VARIABLE output ERROR_VARIABLE output RESULT_VARIABLE result)
  if(NOT result EQUAL 0)
    list(JOIN ARGV " " command)
    message(FATAL_ERROR "${command}\nfailed (${result}):\n${output}")
  endif()
endfunction()

set(prefix ${WORK_DIR}/prefix)
set(example_build ${WORK_DIR}/build)
file(REMOVE_RECURSE ${WORK_DIR})

run(${CMAKE_COMMAND} --install ${BUILD_DIR} --prefix ${prefix} --config ${CONFIG})
run(${CMAKE_COMMAND} -S ${EXAMPLES_DIR} -B ${example_build} -G ${GENERATOR} -DCMAKE_MAKE_PROGRAM=${MAKE_PROGRAM}
    -DCMAKE_CXX_COMPILER=${CXX} -DCMAKE_CXX_FLAGS=${CXX_FLAGS} -DCMAKE_BUILD_TYPE=${CONFIG}
    -DCMAKE_PREFIX_PATH=${prefix} -DCMAKE_FIND_USE_PACKAGE_REGISTRY=OFF)
# The scratch prefix is what was found, not another mate on this machine.
load_cache(${example_build} READ_WITH_PREFIX found_ mate_DIR)
string(FIND "${found_mate_DIR}" "${prefix}/" position)
if(NOT position EQUAL 0)
  message(FATAL_ERROR "find_package(mate) found ${found_mate_DIR}, expected a folder in ${prefix}")
endif()
run(${CMAKE_COMMAND} --build ${example_build} --config ${CONFIG})
run(${example_build}/attention)
