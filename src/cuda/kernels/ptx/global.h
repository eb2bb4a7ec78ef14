// Global memory that several blocks of threads share.
#pragma once

namespace mate::cuda::ptx {

/// Adds, and returns what was there. What this thread has seen written before is written for whoever adds later and
/// looks past the L1 cache.
__device__ inline int add_and_synchronize(int* counter, int value) {
  int before;
  asm volatile("atom.add.acq_rel.gpu.global.s32 %0, [%1], %2;" : "=r"(before) : "l"(counter), "r"(value) : "memory");
  return before;
}

}  // namespace mate::cuda::ptx
