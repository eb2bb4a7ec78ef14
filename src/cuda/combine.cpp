// Launches the kernel that merges partial results.
#include <algorithm>
#include <cstdint>

#include "attention/tiling.h"
#include "backend.h"
#include "device.h"
#include "kernel_library.h"
#include "variants.h"

namespace mate::cuda {

void combine(const CombineProblem& p, int device_id, void* stream) {
  const Device& gpu = device(device_id);
  require_hopper(gpu);
  const std::int64_t rows = std::int64_t{p.batch} * p.rows * p.heads;
  if (rows == 0) return;
  const CurrentContext context(gpu);
  const Kernel kernel = kernels_of<combine_source>().load(gpu, 0, combine_source);
  constexpr int threads = 128;
  constexpr std::int64_t most_blocks = 1 << 20;
  const std::int64_t blocks = divide_up(rows, threads / 32);
  const Launch shape{.grid = {static_cast<unsigned>(std::min(blocks, most_blocks))},
                     .block = {threads},
                     .stream = static_cast<CUstream>(stream)};
  launch(kernel, shape, p);
}

}  // namespace mate::cuda
