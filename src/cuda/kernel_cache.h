// Compiled kernels on disk, for all processes of a user: in MATE_CACHE_DIR, else $XDG_CACHE_HOME/mate, else
// ~/.cache/mate.
#pragma once

#include <string>

#include "compiler.h"

namespace mate::cuda {

struct CachedKernel {
  std::string cubin;
  bool compiled = false;  ///< by this call; else it was there already
};

/// The kernel as the cache has it, else compiled, and then kept for later processes. A file that is damaged or of
/// another source is written anew; where the folder cannot be written, the kernel serves this process alone. With
/// MATE_LOG=compile, says so on stderr. Throws Error (value) where somebody else may write to the folder, and
/// std::runtime_error where there is no compiler or the source is wrong.
CachedKernel cached_kernel(const KernelSource& source);

/// The cache's folder, for mate::describe_backends().
std::string describe_cache();

}  // namespace mate::cuda
