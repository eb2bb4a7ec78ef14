// How many grains each sequence of a call has: what a call's scheduler finds for itself.
#pragma once

#include "split_scheduler.h"

namespace mate::cuda {

/// Each warp counts 32 sequences.
template <ForwardVariant variant>
__device__ void scheduler_metadata(const ForwardArguments& a, int* out, long long stride) {
  const int b = blockIdx.x * blockDim.x + threadIdx.x;
  const long long grains = GrainCounter<variant>(a).grains_of_sequence(b);
  if (b < a.problem.batch) out[b * stride] = clamp(grains, 0, max_length);
}

}  // namespace mate::cuda
