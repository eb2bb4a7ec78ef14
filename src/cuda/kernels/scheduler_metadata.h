// How many grains each sequence of a call has: what a call's scheduler finds for itself.
#pragma once

#include "ptx/launch.h"
#include "split_scheduler.h"

namespace mate::cuda {

/// Each warp counts 32 sequences.
template <ForwardVariant variant>
__device__ void scheduler_metadata(const ForwardArguments& a, int* out, long long stride) {
  ptx::begin_overlapped();
  const int b = blockIdx.x * blockDim.x + threadIdx.x;
  const GrainCounter<variant> counter(a);
  const int grains = counter.count(b).grains * counter.units();
  if (b < a.problem.batch) out[b * stride] = grains;
}

}  // namespace mate::cuda
