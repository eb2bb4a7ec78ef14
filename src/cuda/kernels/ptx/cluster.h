// Clusters: blocks of threads that run at the same time, on multiprocessors that reach each other's shared memory.
#pragma once

#include "ptx/mbarrier.h"

namespace mate::cuda::ptx {

/// This block's number in its cluster.
__device__ inline int block_of_cluster() {
  int number;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(number));
  return number;
}

/// Waits until all threads of the cluster have come here, and sees what they have written.
__device__ inline void cluster_sync() {
  asm volatile(
      "barrier.cluster.arrive.release;\n"
      "barrier.cluster.wait.acquire;" ::
          : "memory");
}

/// Where another block has in its shared memory what this one has at `pointer`.
__device__ inline unsigned shared_address_in(int block, const void* pointer) {
  unsigned address;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(address) : "r"(shared_address(pointer)), "r"(block));
  return address;
}

/// Arrives at that barrier of a block of the cluster: says that this one has read something, not that it has written,
/// for which all earlier writes would have to be waited for.
__device__ inline void arrive_in(int block, Mbarrier& barrier) {
  asm volatile("mbarrier.arrive.shared::cluster.b64 _, [%0];" ::"r"(shared_address_in(block, &barrier)) : "memory");
}

/// Writes a number to another block's shared memory. Its barrier counts the bytes, like those of the copy engine.
__device__ inline void send_to(int block, int& target, int value, Mbarrier& barrier) {
  asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.u32 [%0], %1, [%2];" ::"r"(
                   shared_address_in(block, &target)),
               "r"(value), "r"(shared_address_in(block, &barrier))
               : "memory");
}

}  // namespace mate::cuda::ptx
