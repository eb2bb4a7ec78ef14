// Copies of 4, 8 or 16 bytes from global to shared memory, thread by thread, without registers (cp.async).
#pragma once

#include "ptx/mbarrier.h"

namespace mate::cuda::ptx {

/// Copies `bytes` bytes, or as many zeros where `inside` is false: nothing is read then, wherever `global` points.
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

/// Arrives at the barrier once the copies that this thread has started are done. Who waits for it needs a fence
/// (fence_proxy_async) before products read what was copied.
__device__ inline void arrive_after_copies(Mbarrier& barrier) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(shared_address(&barrier)) : "memory");
}

}  // namespace mate::cuda::ptx
