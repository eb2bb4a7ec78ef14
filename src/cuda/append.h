// New keys and values, and rotation.
#pragma once

#include "attention/problem.h"
#include "device.h"
#include "scratch.h"

namespace mate::cuda {

/// Writes a problem's new keys and values, rotated if it says so, into its cache. Where queries are rotated, they go to
/// scratch memory, which becomes the problem's q.
void append(Problem& problem, const Device& device, CUstream stream, Scratch& scratch);

}  // namespace mate::cuda
