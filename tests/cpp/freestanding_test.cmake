# Compiles HEADER alone, with nothing in reach but the headers FREESTANDING: no system include path.
file(REMOVE_RECURSE ${WORK_DIR})
file(COPY ${FREESTANDING} DESTINATION ${WORK_DIR}/attention)
file(WRITE ${WORK_DIR}/main.cpp "#include \"attention/${HEADER}\"\n")
execute_process(
  COMMAND ${CXX} -std=c++20 -nostdinc -nostdinc++ -fsyntax-only -Wall -Wextra -Werror -I. main.cpp
  WORKING_DIRECTORY ${WORK_DIR} COMMAND_ERROR_IS_FATAL ANY)
