// The tensor copy engine (TMA): boxes of a tensor, described by a tensor map, into shared memory.
#pragma once

#include "ptx/mbarrier.h"
#include "tensor_map.h"

namespace mate::cuda::ptx {

__device__ inline void prefetch(const TensorMap& map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory");
}

/// Policies of the L2 cache, as createpolicy encodes them: constants, since that instruction takes time at each load.
enum class CachePolicy : unsigned long long { evict_normal = 0x1000000000000000, evict_first = 0x12f0000000000000 };

/// What is read once is the first to be forgotten.
__device__ inline CachePolicy policy_of(bool read_once) {
  return read_once ? CachePolicy::evict_first : CachePolicy::evict_normal;
}

/// Copies the box at these coordinates, innermost first; what lies outside the tensor arrives as zeros. `barrier`
/// counts the bytes of the whole box.
__device__ inline void load_box(void* shared, const TensorMap& map, Mbarrier& barrier, CachePolicy policy, int c0,
                                int c1, int c2, int c3) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1, {%3, %4, "
      "%5, %6}], [%2], %7;" ::"r"(shared_address(shared)),
      "l"(&map), "r"(shared_address(&barrier)), "r"(c0), "r"(c1), "r"(c2), "r"(c3),
      "l"(static_cast<unsigned long long>(policy))
      : "memory");
}

/// The same into the shared memory of every block of the cluster, whose barriers count the bytes.
__device__ inline void load_box_for_cluster(void* shared, const TensorMap& map, Mbarrier& barrier, CachePolicy policy,
                                            unsigned short blocks, int c0, int c1, int c2, int c3) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster.L2::cache_hint "
      "[%0], [%1, {%3, %4, %5, %6}], [%2], %7, %8;" ::"r"(shared_address(shared)),
      "l"(&map), "r"(shared_address(&barrier)), "r"(c0), "r"(c1), "r"(c2), "r"(c3), "h"(blocks),
      "l"(static_cast<unsigned long long>(policy))
      : "memory");
}

__device__ inline void load_box_for_cluster(void* shared, const TensorMap& map, Mbarrier& barrier, CachePolicy policy,
                                            unsigned short blocks, int c0, int c1, int c2, int c3, int c4) {
  asm volatile(
      "cp.async.bulk.tensor.5d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster.L2::cache_hint "
      "[%0], [%1, {%3, %4, %5, %6, %7}], [%2], %8, %9;" ::"r"(shared_address(shared)),
      "l"(&map), "r"(shared_address(&barrier)), "r"(c0), "r"(c1), "r"(c2), "r"(c3), "r"(c4), "h"(blocks),
      "l"(static_cast<unsigned long long>(policy))
      : "memory");
}

__device__ inline void load_box(void* shared, const TensorMap& map, Mbarrier& barrier, int c0, int c1, int c2, int c3,
                                int c4) {
  asm volatile(
      "cp.async.bulk.tensor.5d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5, %6, %7}], "
      "[%2];" ::"r"(shared_address(shared)),
      "l"(&map), "r"(shared_address(&barrier)), "r"(c0), "r"(c1), "r"(c2), "r"(c3), "r"(c4)
      : "memory");
}

__device__ inline void load_box(void* shared, const TensorMap& map, Mbarrier& barrier, CachePolicy policy, int c0,
                                int c1, int c2, int c3, int c4) {
  asm volatile(
      "cp.async.bulk.tensor.5d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1, {%3, %4, "
      "%5, %6, %7}], [%2], %8;" ::"r"(shared_address(shared)),
      "l"(&map), "r"(shared_address(&barrier)), "r"(c0), "r"(c1), "r"(c2), "r"(c3), "r"(c4),
      "l"(static_cast<unsigned long long>(policy))
      : "memory");
}

}  // namespace mate::cuda::ptx
