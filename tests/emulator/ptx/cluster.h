#pragma once

#include "ptx/mbarrier.h"

namespace mate::cuda::ptx {

inline int block_of_cluster() { return emulator::emulator_block_of_cluster; }
inline int blocks_of_cluster() { return emulator::emulator_blocks_of_cluster; }
inline void cluster_sync() { emulator::emulator_cluster_sync(); }

/// What another block has where this one has `own`.
template <typename T>
T& of_block(int block, T& own) {
  return *reinterpret_cast<T*>(emulator::emulator_memory_of(block) + shared_address(&own));
}

inline void arrive_in(int block, Mbarrier& barrier) { of_block(block, barrier).arrive(); }

template <typename T>
T load_from(int block, const T& own) {
  return of_block(block, own);
}

inline void send_to(int block, int& target, int value, Mbarrier& barrier) {
  of_block(block, target) = value;
  of_block(block, barrier).bring(sizeof(value));
}

}  // namespace mate::cuda::ptx
