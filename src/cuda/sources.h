// The device code that is embedded in the library; cmake/EmbedSources.cmake writes the definition.
#pragma once

#include <span>

namespace mate::cuda {

struct EmbeddedHeader {
  const char* name;  ///< as #include names it
  const char* text;
};

std::span<const EmbeddedHeader> embedded_headers();

}  // namespace mate::cuda
