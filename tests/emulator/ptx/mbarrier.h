#pragma once

#include "ptx/shared.h"

namespace mate::cuda::ptx {

struct Mbarrier {
  short arrivals;  ///< of a phase
  short awaited;   ///< of them
  int bytes : 31;  ///< that the copy engine has yet to bring
  unsigned phase : 1;

  void init(int count) {
    arrivals = static_cast<short>(count);
    awaited = arrivals;
    bytes = 0;
    phase = 0;
  }
  void arrive() {
    if (awaited == 0) std::abort();  // more than were expected
    --awaited;
    complete_phase();
  }
  void arrive_expecting(int count) {
    bytes += count;
    arrive();
  }
  void bring(int count) {
    bytes -= count;
    complete_phase();
  }

  bool is_complete(unsigned parity) {
    emulator::emulator_yield();
    return phase != parity;
  }
  void wait(unsigned parity) {
    while (phase == parity) emulator::emulator_yield();
  }
  void wait_for_cluster(unsigned parity) { wait(parity); }

 private:
  void complete_phase() {
    if (awaited > 0 || bytes != 0) return;  // bytes may come before they are expected
    phase ^= 1;
    awaited = arrivals;
  }
};
static_assert(sizeof(Mbarrier) == 8);

inline void fence_mbarrier_init() {}

}  // namespace mate::cuda::ptx
