// Counters of kernels whose blocks work together.
#pragma once

#include "driver.h"

namespace mate::cuda {

inline constexpr int counters_of_launch = 1024;

/// counters_of_launch ints of device memory for the next launch on a stream, in the current context. They are zero, and
/// the kernel leaves them zero. Launches of one stream follow one another and share them; while a stream is captured
/// each call gives new ones, since its graph may run beside anything. Never freed.
int* counters(CUstream stream);

}  // namespace mate::cuda
