// What the kernel that appends to a cache is given.
#pragma once

#include "attention/problem.h"

namespace mate::cuda {

/// Threads of a block: many, so that blocks are few, beside which none of the next kernel has room.
inline constexpr int append_threads = 512;

/// What is appended to what, and what is rotated.
struct AppendTypes {
  ElementType query = ElementType::bfloat16;
  ElementType added = ElementType::bfloat16;  ///< new keys and values
  ElementType key = ElementType::bfloat16;    ///< of the cache
};

struct AppendArguments {
  Problem problem;
  Rows rotated_q;  ///< where queries go, which are laid out as in problem.q
};

}  // namespace mate::cuda
