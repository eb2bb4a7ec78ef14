// New keys and values, and rotation.
#pragma once

#include "attention/problem.h"
#include "device.h"
#include "kernel_library.h"
#include "kernels/append_arguments.h"
#include "scratch.h"

namespace mate::cuda {

/// Writes a problem's new keys and values, rotated if it says so, into its cache.
class Append {
 public:
  /// Prepares all that may fail. Where queries are rotated, they go to scratch memory, which becomes the problem's q.
  Append(Problem& problem, const Device& device, CUstream stream, Scratch& scratch);

  void launch() const { cuda::launch(kernel_, shape_, arguments_); }

 private:
  Kernel kernel_;
  Launch shape_;
  AppendArguments arguments_;
};

}  // namespace mate::cuda
