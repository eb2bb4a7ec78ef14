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

/// How many blocks its cluster has.
__device__ inline int blocks_of_cluster() {
  int count;
  asm("mov.u32 %0, %%cluster_nctaid.x;" : "=r"(count));
  return count;
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

/// Arrives at that barrier of a block of the cluster: says that this one has done with something, not that others may
/// read what it has written, for which all earlier writes would have to be waited for.
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

/// What a block of the cluster has in its shared memory where this one has `own`.
__device__ inline float4 load_from(int block, const float4& own) {
  float4 value;
  asm volatile("ld.shared::cluster.v4.f32 {%0, %1, %2, %3}, [%4];"
               : "=f"(value.x), "=f"(value.y), "=f"(value.z), "=f"(value.w)
               : "r"(shared_address_in(block, &own)));
  return value;
}
__device__ inline float2 load_from(int block, const float2& own) {
  float2 value;
  asm volatile("ld.shared::cluster.v2.f32 {%0, %1}, [%2];"
               : "=f"(value.x), "=f"(value.y)
               : "r"(shared_address_in(block, &own)));
  return value;
}

}  // namespace mate::cuda::ptx
