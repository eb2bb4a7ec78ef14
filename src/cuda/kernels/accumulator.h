// How a warpgroup's product lies in registers.
//
// An accumulator of 64 rows by n columns is n / 2 registers a thread. Lane l of warp w holds two rows, 16 w + l / 4 and
// the one 8 below it; of each, in every eight columns, the two that begin at 2 (l % 4). Register 4 j + 2 i + c is
// column 8 j + 2 (l % 4) + c of row i. Four lanes side by side, a quad, hold a row together.
#pragma once

namespace mate::cuda {

/// Rows of the accumulator that a thread holds parts of.
inline constexpr int rows_of_thread = 2;

/// Row i, of 16, of a warp, among its warpgroup's 64.
__device__ inline int accumulator_row_of_warp(int i) { return static_cast<int>(threadIdx.x % 128 / 32) * 16 + i; }

/// A thread's row i, likewise.
__device__ inline int accumulator_row(int i) {
  return accumulator_row_of_warp(static_cast<int>(threadIdx.x % 32 / 4) + 8 * i);
}

/// The first column that this thread holds.
__device__ inline int accumulator_column() { return 2 * static_cast<int>(threadIdx.x % 4); }

__device__ inline float quad_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(~0U, x, 1));
  return fmaxf(x, __shfl_xor_sync(~0U, x, 2));
}

__device__ inline float quad_sum(float x) {
  x += __shfl_xor_sync(~0U, x, 1);
  return x + __shfl_xor_sync(~0U, x, 2);
}

}  // namespace mate::cuda
