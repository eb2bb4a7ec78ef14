// Work that is shared by many, without a word between them.
#pragma once

#include "attention/visibility.h"

namespace mate::cuda {

/// One of those that share some work: warps, blocks of threads, or some of them.
struct Sharer {
  int number;
  int count;

  /// Shares `parts` parts: each is one sharer's, or several share it. Calls take(part, sharer of the part).
  template <typename Take>
  __device__ void share(int parts, const Take& take) const {
    const int of_part = max(divide(count, parts), 1);
    const int member = divide(number, parts);
    if (member >= of_part) return;
#pragma unroll 1
    for (int part = number - member * parts; part < parts; part += count) take(part, Sharer{member, of_part});
  }
};

}  // namespace mate::cuda
