// About how many steps each sequence of a call takes (attention/shares.h). No kernel reads that: schedulers count for
// themselves, as their tiles are.
#pragma once

#include "ptx/launch.h"
#include "split_scheduler.h"

namespace mate::cuda {

/// Each warp counts 32 sequences.
template <ForwardVariant variant>
__device__ void scheduler_metadata(const ForwardArguments& a, int* out, long long stride) {
  ptx::begin_overlapped();
  const int b = blockIdx.x * blockDim.x + threadIdx.x;
  const StepCounter<variant> counter(a);
  const int steps = counter.count(b).steps * counter.units();
  if (b < a.problem.batch) out[b * stride] = steps;
}

}  // namespace mate::cuda
