// What the lanes of a warp find out together.
#pragma once

namespace mate::cuda {

__device__ inline bool first_lane() { return threadIdx.x % 32 == 0; }

/// The pointer that another lane has.
template <typename T>
__device__ inline T* from_lane(T* pointer, int lane) {
  return reinterpret_cast<T*>(__shfl_sync(~0U, reinterpret_cast<unsigned long long>(pointer), lane));
}

__device__ inline float warp_max(float x) {
  for (int distance = 16; distance > 0; distance /= 2) x = fmaxf(x, __shfl_xor_sync(~0U, x, distance));
  return x;
}

__device__ inline float warp_sum(float x) {
  for (int distance = 16; distance > 0; distance /= 2) x += __shfl_xor_sync(~0U, x, distance);
  return x;
}
__device__ inline int warp_sum(int x) { return __reduce_add_sync(~0U, x); }

/// The sum over this lane and those before it.
__device__ inline int warp_prefix_sum(int x) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int distance = 1; distance < 32; distance *= 2) {
    const int other = __shfl_up_sync(~0U, x, distance);
    if (lane >= distance) x += other;
  }
  return x;
}

}  // namespace mate::cuda
