// Rings of buffers in shared memory that a producer fills and consumers empty.
#pragma once

#include "ptx/cluster.h"
#include "warp.h"

namespace mate::cuda {

/// The barriers of a ring of buffers that a producer fills and consumers empty.
template <int stages>
struct RingBarriers {
  ptx::Mbarrier full[stages], empty[stages];

  __device__ void init(int producers, int consumers) {
    for (int i = 0; i < stages; ++i) {
      full[i].init(producers);
      empty[i].init(consumers);
    }
  }
};

/// A place in a ring, and the parity of the round. The producer waits for the other parity: all is empty at first.
template <int stages>
class RingPlace {
 public:
  __device__ int stage() const { return static_cast<int>(count_ % stages); }
  __device__ unsigned parity() const { return count_ / stages % 2; }
  __device__ bool is_first() const { return count_ == 0; }
  __device__ bool is_odd() const { return count_ % 2 != 0; }
  __device__ void advance(int count = 1) { count_ += count; }
  /// The same place, whose stage is computed anew: for code with few registers.
  __device__ RingPlace again() const { return RingPlace(ptx::known_only_here(static_cast<int>(count_))); }
  __device__ RingPlace before(int count) const { return RingPlace(count_ - count); }
  /// The place of the same number in another ring.
  template <int stages_of_other>
  __device__ RingPlace<stages_of_other> in() const {
    return RingPlace<stages_of_other>(count_);
  }

  RingPlace() = default;
  __device__ explicit RingPlace(unsigned count) : count_(count) {}

 private:
  unsigned count_ = 0;
};

/// Consumers that score ahead wait for the keys of the next block, be there one or not: behind the last one the warps
/// that would bring them say that they are there, by a lane for each, or by all where rows are gathered.
template <int stages>
__device__ inline void announce_no_more(RingBarriers<stages>& keys, RingPlace<stages> next, bool each_lane) {
  keys.empty[next.stage()].wait(next.parity() ^ 1);
  if (each_lane || first_lane()) keys.full[next.stage()].arrive();
}

/// Each warp that has done with a buffer says so.
__device__ inline void release(ptx::Mbarrier& empty) {
  if (first_lane()) empty.arrive();
}

/// The same to all of so many blocks of a cluster, which fill each other's buffers.
template <int cluster_blocks>
__device__ inline void release_for(ptx::Mbarrier& empty) {
  if constexpr (cluster_blocks > 1) {
    const int lane = threadIdx.x % 32;
    if (lane < cluster_blocks) ptx::arrive_in(lane, empty);
  } else {
    release(empty);
  }
}

}  // namespace mate::cuda
