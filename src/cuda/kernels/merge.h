// Merges the results over parts of a row's keys.
#pragma once

#include "softmax.h"

namespace mate::cuda {

/// What a part knows of its weights: sums[i] = sum_j 2**(score_j - max) * v[j][i] over some keys, and sum likewise
/// without v.
struct PartWeight {
  float max;  ///< -inf: the part has no keys, and its sums are not read
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

/// Sums that are asked for at once, unless fewer are enough.
inline constexpr int most_at_once = 16;

/// A warp merges `parts` parts of a row of `width` sums, in their order, and hands columns to store(column, sums), as
/// many as `Columns` has: float, or float4 where rows are aligned to it and have room for a multiple of it.
/// weight_of(j) is a PartWeight, and read(j, column) are columns of sums. Where all of them are `written` they are
/// asked for at once, up to `at_once`, weights or not: much of what a short call takes is waiting for them.
/// finish(weight) is given that of all parts together, and says what the sums are to be multiplied by: 0 where they are
/// to become 0, whatever they are.
template <typename Columns, bool written, int at_once = most_at_once, typename WeightOf, typename Read, typename Finish,
          typename Store>
__device__ inline void merge_row(int parts, int width, const WeightOf& weight_of, const Read& read,
                                 const Finish& finish, const Store& store) {
  static_assert(32 % at_once == 0);
  constexpr int columns = sizeof(Columns) / sizeof(float);
  const PartWeight nothing{-infinity(), 0};
  const int lane = threadIdx.x % 32;
  Columns loaded[at_once];
  PartWeight mine = nothing;
  const auto load = [&](int first_part, int column) {
#pragma unroll
    for (int j = 0; j < at_once; ++j) {
      const int part = first_part + j;
      const bool needed = written || __shfl_sync(~0U, mine.max, part % 32) != -infinity();
      loaded[j] = {};
      if (part < parts && column < width && needed) {
        loaded[j] = read(part, column);
      }
    }
  };

  if constexpr (written) load(0, lane * columns);
  if (lane < parts) mine = weight_of(lane);
  float max = mine.max;
#pragma unroll 1
  for (int j = lane + 32; j < parts; j += 32) max = fmaxf(max, weight_of(j).max);
  max = warp_max(max);
  const float base = max == -infinity() ? 0 : max;
  float sum = mine.sum * exp2_approximately(mine.max - base);
#pragma unroll 1
  for (int j = lane + 32; j < parts; j += 32) {
    const PartWeight weight = weight_of(j);
    sum += weight.sum * exp2_approximately(weight.max - base);
  }
  const float share = finish(PartWeight{max, warp_sum(sum)});

#pragma unroll 1
  for (int column = lane * columns; column - lane * columns < width; column += 32 * columns) {
    float total[columns] = {};
    float factor = 0;
#pragma unroll 1
    for (int first_part = 0; first_part < parts; first_part += at_once) {
      if (first_part % 32 == 0) {
        if (parts > 32) mine = first_part + lane < parts ? weight_of(first_part + lane) : nothing;
        factor = exp2_approximately(mine.max - base) * share;
      }
      if (!written || first_part > 0 || column >= 32 * columns) load(first_part, column);
#pragma unroll
      for (int j = 0; j < at_once; ++j) {
        const float factor_of_part = __shfl_sync(~0U, factor, (first_part + j) % 32);
        const auto* const values = reinterpret_cast<const float*>(&loaded[j]);
#pragma unroll
        for (int i = 0; i < columns; ++i) total[i] = fmaf(factor_of_part, values[i], total[i]);
      }
    }
    if (share == 0) {
#pragma unroll
      for (float& sum_of_column : total) sum_of_column = 0;
    }
    if (column < width) store(column, total);
  }
}

}  // namespace mate::cuda
