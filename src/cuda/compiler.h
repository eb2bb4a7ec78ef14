// NVIDIA's run-time compiler, NVRTC, reached by dlopen.
#pragma once

#include <string>
#include <vector>

namespace mate::cuda {

/// A kernel before it is compiled.
struct KernelSource {
  std::string name;      ///< of its extern "C" entry, and of the file that messages of the compiler speak of
  std::string text;      ///< may include the embedded headers, and nothing else
  int shared_bytes = 0;  ///< dynamic shared memory of a block
};

struct Compilation {
  std::string cubin;
  std::string log;  ///< warnings, and what the assembler says of registers and spills
  double seconds = 0;
};

/// Compiles for Hopper (sm_90a). Threads may compile at once. Throws std::runtime_error, with the compiler's log, where
/// the source is wrong, and where there is no compiler.
Compilation compile(const KernelSource& source);

/// Everything but the kernel's own source that decides what compile() makes of it.
std::string compiler_identity();

/// Folders to look for NVRTC in, beside those that are looked through anyway: those of Python's NVIDIA packages.
void set_compiler_folders(const std::vector<std::string>& folders);

/// The compiler in use and its place, for mate::describe_backends(). Throws where there is none.
std::string describe_compiler();

}  // namespace mate::cuda
