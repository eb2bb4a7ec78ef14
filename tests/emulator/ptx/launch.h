#pragma once

namespace mate::cuda::ptx {

/// They have ended; but the other threads of the block are let believe that they have not.
inline void await_earlier_kernels() {
  constexpr int turns = 40;
  for (int i = 0; i < turns; ++i) emulator::emulator_yield();
}
inline void let_next_kernel_begin() {}
inline void fence_acquire() {}
inline void begin_overlapped() {}

}  // namespace mate::cuda::ptx
