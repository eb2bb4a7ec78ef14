#pragma once

#include "ptx/mbarrier.h"

namespace mate::cuda::ptx {

template <int bytes>
void copy_async(unsigned shared, const void* global, bool inside) {
  if (inside) {
    std::memcpy(memory + shared, global, bytes);
  } else {
    std::memset(memory + shared, 0, bytes);
  }
}

inline void arrive_after_copies(Mbarrier& barrier) { barrier.arrive(); }

}  // namespace mate::cuda::ptx
