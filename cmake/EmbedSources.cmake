# Writes OUTPUT, a C++ file that holds the texts of HEADERS under the names that they have below one of FOLDERS. An
# #include of device code names them so: a run-time compiler looks nowhere else.

set(names "")
set(entries "")
foreach(header IN LISTS HEADERS)
  foreach(folder IN LISTS FOLDERS)
    cmake_path(IS_PREFIX folder ${header} below)
    if(below)
      cmake_path(RELATIVE_PATH header BASE_DIRECTORY ${folder} OUTPUT_VARIABLE name)
      break()
    endif()
  endforeach()
  if(name IN_LIST names)
    message(FATAL_ERROR "Two headers of the device code are named ${name}")
  endif()
  list(APPEND names ${name})
  file(READ ${header} text)
  string(APPEND entries "    {\"${name}\", R\"embedded(${text})embedded\"},\n")
endforeach()

file(WRITE ${OUTPUT} "// Written by cmake/EmbedSources.cmake.
#include \"cuda/sources.h\"

namespace mate::cuda {
namespace {

constexpr EmbeddedHeader headers[] = {
${entries}};

}  // namespace

std::span<const EmbeddedHeader> embedded_headers() { return headers; }

}  // namespace mate::cuda
")
