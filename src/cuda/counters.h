// Counters of kernels whose blocks work together.
#pragma once

#include "driver.h"

namespace mate::cuda {

/// Of a launch, and of a call, which may make two launches side by side.
inline constexpr int counters_of_launch = 512;
inline constexpr int counters_of_call = 2 * counters_of_launch;

/// counters_of_call ints of device memory for the next call on a stream, in the current context. They are zero, and
/// kernels leave them zero. Calls on one stream follow one another and share them; while a stream is captured each
/// call gets new ones, since its graph may run beside anything. Never freed.
int* counters(CUstream stream);

}  // namespace mate::cuda
