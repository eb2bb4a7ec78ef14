// What the kernel that appends to a cache is given.
#pragma once

#include "attention/problem.h"

namespace mate::cuda {

struct AppendArguments {
  Problem problem;
  Rows rotated_q;  ///< where queries go, which are laid out as in problem.q
};

}  // namespace mate::cuda
