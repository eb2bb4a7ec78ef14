// Barriers in shared memory that count arriving threads and arriving bytes (mbarrier).
#pragma once

#include "ptx/shared.h"

namespace mate::cuda::ptx {

/// One barrier. Its phases alternate between parity 0 and 1.
struct Mbarrier {
  unsigned long long state;

  __device__ void init(int arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(this)), "r"(arrivals) : "memory");
  }

  __device__ void arrive() {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(this)) : "memory");
  }

  /// Arrives, and makes the phase wait for `bytes` that the copy engine will bring.
  __device__ void arrive_expecting(int bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(this)), "r"(bytes)
                 : "memory");
  }

// Asks whether the phase is complete, at once (test_wait) or when that has happened or some time has passed (try_wait).
#define MATE_ASK(instruction)                  \
  unsigned complete;                           \
  asm volatile(                                \
      "{\n"                                    \
      ".reg .pred complete;\n"                 \
      "mbarrier." instruction                  \
      ".shared::cta.b64 complete, [%1], %2;\n" \
      "selp.u32 %0, 1, 0, complete;\n"         \
      "}"                                      \
      : "=r"(complete)                         \
      : "r"(shared_address(this)), "r"(parity) \
      : "memory");                             \
  return complete != 0

  /// Whether the phase of this parity is complete.
  __device__ bool is_complete(unsigned parity) { MATE_ASK("test_wait.parity"); }

  /// Waits until it is.
  __device__ void wait(unsigned parity) {
    while (!becomes_complete(parity)) {
    }
  }

  /// The same, and sees what other blocks of the cluster have written before.
  __device__ void wait_for_cluster(unsigned parity) {
    while (!becomes_complete_for_cluster(parity)) {
    }
  }

 private:
  __device__ bool becomes_complete_for_cluster(unsigned parity) { MATE_ASK("try_wait.parity.acquire.cluster"); }
  __device__ bool becomes_complete(unsigned parity) { MATE_ASK("try_wait.parity"); }

#undef MATE_ASK
};

/// Makes barriers that one thread has initialised visible to the copy engine.
__device__ inline void fence_mbarrier_init() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }

}  // namespace mate::cuda::ptx
