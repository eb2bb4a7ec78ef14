// Merges the results over parts of a row's keys.
#pragma once

#include "ptx/shared.h"
#include "softmax.h"
#include "warp.h"

namespace mate::cuda {

/// What a part knows of its weights: sums[i] = sum_j 2**(score_j - max) * v[j][i] over some keys, and sum likewise
/// without v.
struct PartWeight {
  float max;  ///< -inf: the part has no keys, and its sums are not read
  float sum;
};

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

/// What a row's merged sums are to be multiplied by, 0 where they are to become 0, and where they go.
struct MergedRow {
  float share = 0;
  unsigned short* out = nullptr;
};

/// The same of `count` rows, at most 32, whose sums are all written: for many rows, since it takes far fewer
/// instructions a row, but needs the weights before it has them added up. Lane i has weight_of(i, part) of row i, and
/// calls finish(i, weight), which gives a MergedRow; the warp reads columns by read(i, part, column), and hands them to
/// store(out, column, sums). `lines_at_once` are asked for together, as registers allow.
template <int lines_at_once, typename WeightOf, typename Read, typename Finish, typename Store>
__device__ inline void merge_rows(int count, int parts, int width, const WeightOf& weight_of, const Read& read,
                                  const Finish& finish, const Store& store) {
  constexpr int parts_at_once = lines_at_once <= 4 ? 4 : 3;
  const int lane = ptx::known_only_here(threadIdx.x % 32);
  PartWeight all{-infinity(), 0};
  const auto base = [&] { return all.max == -infinity() ? 0 : all.max; };
  if (lane < count) {
#pragma unroll 4
    for (int part = 0; part < parts; ++part) {
      const PartWeight weight = weight_of(lane, part);
      const float before = all.max;
      all.max = fmaxf(before, weight.max);
      all.sum = all.sum * exp2_approximately(before - base()) + weight.sum * exp2_approximately(weight.max - base());
    }
  }
  MergedRow merged;
  if (lane < count) merged = finish(lane, all);

  // So many columns of a row are a line.
  constexpr int columns_of_line = 4 * 32;
  int row = 0;
  int first_column = count > 0 ? 0 : width;
#pragma unroll 1
  while (first_column < width) {
    int rows[lines_at_once];
    int columns[lines_at_once];
    float total[lines_at_once][4] = {};
#pragma unroll
    for (int i = 0; i < lines_at_once; ++i) {
      rows[i] = row;
      columns[i] = first_column + lane * 4;
      if (++row == count) {
        row = 0;
        first_column += columns_of_line;
      }
    }
#pragma unroll 1
    for (int first_part = 0; first_part < parts; first_part += parts_at_once) {
      float4 loaded[lines_at_once][parts_at_once];
      float factor[parts_at_once];  // of this lane's row
#pragma unroll
      for (int j = 0; j < parts_at_once; ++j) {
        const int part = first_part + j;
        factor[j] = -infinity();
        if (lane < count && part < parts) factor[j] = weight_of(lane, part).max;
#pragma unroll
        for (int i = 0; i < lines_at_once; ++i) {
          loaded[i][j] = {};
          if (part < parts && columns[i] < width) loaded[i][j] = read(rows[i], part, columns[i]);
        }
      }
#pragma unroll
      for (float& of_part : factor) of_part = exp2_approximately(of_part - base()) * merged.share;
#pragma unroll
      for (int i = 0; i < lines_at_once; ++i) {
#pragma unroll
        for (int j = 0; j < parts_at_once; ++j) {
          const float factor_of_part = __shfl_sync(~0U, factor[j], rows[i]);
          const float values[4] = {loaded[i][j].x, loaded[i][j].y, loaded[i][j].z, loaded[i][j].w};
#pragma unroll
          for (int c = 0; c < 4; ++c) total[i][c] = fmaf(factor_of_part, values[c], total[i][c]);
        }
      }
    }
#pragma unroll
    for (int i = 0; i < lines_at_once; ++i) {
      const float share = __shfl_sync(~0U, merged.share, rows[i]);
      unsigned short* const out = from_lane(merged.out, rows[i]);
#pragma unroll
      for (float& sum : total[i]) sum = share == 0 ? 0 : sum;
      if (columns[i] < width) store(out, columns[i], total[i]);
    }
  }
}

}  // namespace mate::cuda
