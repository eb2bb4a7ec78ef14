// The compiler that the tests' Python environment brings.
#pragma once

#include <stdexcept>
#include <string>

#include "cuda/compiler.h"

namespace mate::cuda {

inline void look_in_python_packages() {
  set_compiler_folders({MATE_SITE_PACKAGES "/nvidia/cu13/lib", MATE_SITE_PACKAGES "/nvidia/cuda_nvrtc/lib"});
}

/// Why there is no compiler; empty where there is one.
inline std::string why_no_compiler() {
  try {
    describe_compiler();
    return {};
  } catch (const std::runtime_error& error) {
    return error.what();
  }
}

}  // namespace mate::cuda
