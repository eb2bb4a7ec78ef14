// Copies of 4, 8 or 16 bytes from global to shared memory, thread by thread, without registers (cp.async).
#pragma once

#include "ptx/shared.h"

namespace mate::cuda::ptx {

/// Copies `bytes` bytes, or as many zeros where `inside` is false: nothing is read then.
template <int bytes>
__device__ inline void copy_async(unsigned shared, const void* global, bool inside) {
  const int source_bytes = inside ? bytes : 0;
  if constexpr (bytes == 16) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared), "l"(global), "r"(source_bytes)
                 : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %3, %2;" ::"r"(shared), "l"(global), "r"(source_bytes),
                 "n"(bytes)
                 : "memory");
  }
}

__device__ inline void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

/// Waits until at most `pending` of the committed groups of this thread are still on their way.
template <int pending>
__device__ inline void wait_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(pending) : "memory");
}

}  // namespace mate::cuda::ptx
