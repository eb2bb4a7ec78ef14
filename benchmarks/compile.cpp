// What compiling the GPU kernels of models takes: seconds, bytes, registers.
//
//   compile [D | DxDV]...      head sizes of keys, and of values where they differ
//
// Needs no GPU, but NVRTC: MATE_NVRTC names it where it is not found by itself.
#include <cstdio>
#include <exception>
#include <set>
#include <string>
#include <vector>

#include "cuda/compile_log.h"
#include "cuda/compiler.h"
#include "cuda/variants.h"

using namespace mate;

int main(int argc, char** argv) try {
  setenv("CUDA_CACHE_DISABLE", "1", 1);  // NVRTC would take kernels from the driver's cache
  std::vector<std::string> models(argv + 1, argv + argc);
  if (models.empty()) models = {"64", "96", "128", "192x128", "256"};
  std::printf("%s\n\n", cuda::describe_compiler().c_str());
  std::printf(
      "| kernel | seconds | bytes | registers at the start | spilled bytes |\n| --- | --- | --- | --- | --- |\n");
  std::set<std::string> seen;
  for (const std::string& model : models) {
    const std::size_t separator = model.find('x');
    const int head_dim = std::stoi(model);
    const int head_dim_v = separator == std::string::npos ? head_dim : std::stoi(model.substr(separator + 1));
    for (const bool softcap : {false, true}) {
      for (const cuda::KernelSource& source : cuda::kernels_for(head_dim, head_dim_v, {}, softcap, false)) {
        if (!seen.insert(source.name).second) continue;
        const cuda::Compilation made = cuda::compile(source);
        const cuda::CompileLog log = cuda::read_log(made.log);
        std::printf("| %s | %.2f | %zu | %d | %d |\n", source.name.c_str(), made.seconds, made.cubin.size(),
                    log.registers, log.spill_bytes);
        std::fflush(stdout);
      }
    }
  }
  return 0;
} catch (const std::exception& error) {
  std::fprintf(stderr, "%s\n", error.what());
  return 1;
}
