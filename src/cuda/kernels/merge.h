// Merges the results over parts of a row's keys.
#pragma once

#include "softmax.h"

namespace mate::cuda {

/// sums[i] = sum_j 2**(score_j - max) * v[j][i] over some keys, and sum likewise without v. A part without sums is left
/// out.
struct PartialRow {
  const float* sums;
  float max;
  float sum;
};

__device__ inline float warp_max(float x) {
  for (int distance = 16; distance > 0; distance /= 2) x = fmaxf(x, __shfl_xor_sync(~0U, x, distance));
  return x;
}

__device__ inline float warp_sum(float x) {
  for (int distance = 16; distance > 0; distance /= 2) x += __shfl_xor_sync(~0U, x, distance);
  return x;
}

/// A warp merges `parts` parts, which part_of(j) gives, of a row of `width` sums, in their order, and hands columns to
/// store(column, first, second): those at `column`, which is even, and the one after it. Returns the log-sum-exp.
/// `sink` is a natural logarithm, -inf where there is none.
template <typename PartOf, typename Store>
__device__ inline float merge_row(int parts, float sink, int width, const PartOf& part_of, const Store& store) {
  const int lane = threadIdx.x % 32;
  float max = -infinity();
  for (int j = lane; j < parts; j += 32) {
    const PartialRow part = part_of(j);
    if (part.sums != nullptr) max = fmaxf(max, part.max);
  }
  max = warp_max(max);
  const float base = max == -infinity() ? 0 : max;
  float sum = 0;
  for (int j = lane; j < parts; j += 32) {
    const PartialRow part = part_of(j);
    if (part.sums != nullptr) sum += part.sum * exp2_approximately(part.max - base);
  }
  float share;
  const float lse = finish_softmax(base, warp_sum(sum), sink, share);

  for (int first_column = 0; first_column < width; first_column += 64) {
    const int column = first_column + 2 * lane;
    float first = 0;
    float second = 0;
    for (int first_part = 0; first_part < parts; first_part += 32) {
      const int here = parts - first_part < 32 ? parts - first_part : 32;
      PartialRow mine{};
      if (lane < here) mine = part_of(first_part + lane);
      const float factor = mine.sums == nullptr ? 0 : exp2_approximately(mine.max - base) * share;
      const auto sums = reinterpret_cast<unsigned long long>(mine.sums);
#pragma unroll 4
      for (int j = 0; j < here; ++j) {
        const float factor_of_part = __shfl_sync(~0U, factor, j);
        const auto* const row = reinterpret_cast<const float*>(__shfl_sync(~0U, sums, j));
        if (row == nullptr || share == 0) continue;
        if (column < width) first = fmaf(factor_of_part, __ldcg(row + column), first);
        if (column + 1 < width) second = fmaf(factor_of_part, __ldcg(row + column + 1), second);
      }
    }
    if (column < width) store(column, first, second);
  }
  return lse;
}

}  // namespace mate::cuda
