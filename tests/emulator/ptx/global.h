#pragma once

namespace mate::cuda::ptx {

inline int add_and_synchronize(int* counter, int value) { return atomicAdd(counter, value); }

}  // namespace mate::cuda::ptx
