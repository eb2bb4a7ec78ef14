// The inner loops of the CPU backend: the seam behind which each instruction set has its own.
#pragma once

#include "attention/problem.h"
#include "attention/visibility.h"

namespace mate::cpu {

/// Keys of a block, and so the row length of the matrices of scores.
inline constexpr int block_keys = 64;
/// Most query rows of a tile.
inline constexpr int tile_rows = 64;
/// Widths of matrices are rounded up to a multiple of this, so that no kernel has a ragged edge.
inline constexpr int width_multiple = 16;

/// The online softmax of one query row, in the base-2 domain: sum = sum_j 2**(score_j - max).
struct RunningSoftmax {
  float max;
  float sum;
};

/// Matrices are row-major float32. Each operation gives a row the same bits whatever the other rows hold.
struct Kernels {
  const char* name;

  /// target[i] = factor * source[i], i < count.
  void (*widen)(ElementType type, const void* source, float factor, float* target, int count);

  /// target[i] = source[i] rounded to `type`.
  void (*narrow)(const float* source, ElementType type, void* target, int count);

  /// target (width, block_keys)[:, columns] = rows (block_keys, row_stride)[columns, :width], transposed. Columns up to
  /// the next multiple of 4 on either side may be written too.
  void (*transpose)(const float* rows, int row_stride, KeyRange columns, int width, float* target);

  /// scores (rows, block_keys)[:, columns] = queries (rows, depth) . keys (depth, block_keys)[:, columns]. Other
  /// columns may be written too.
  void (*multiply_scores)(const float* queries, const float* keys, KeyRange columns, float* scores, int rows,
                          int depth);

  /// The same of a single row against keys (block_keys, row_stride)[columns, :depth] that are not transposed:
  /// scores[column] becomes the product, or grows by it.
  void (*dot_scores)(const float* query, const float* keys, int row_stride, KeyRange columns, int depth, bool add,
                     float* scores);

  /// scores[i] = softcap * tanh(scale * scores[i] / softcap).
  void (*cap_scores)(float* scores, float scale, float softcap, int count);

  /// Takes the scores of one row in, multiplied by `scale` to the base-2 domain: those of the columns outside `visible`
  /// become 0, the others 2**(score - max). Returns what the row's sums so far must be multiplied by.
  float (*update_softmax)(float* scores, KeyRange visible, float scale, RunningSoftmax& row);

  /// sums (rows, width) = rescale (rows) * sums + weights (rows, block_keys)[:, columns] . values (block_keys, width)
  /// [columns, :]. width is a multiple of width_multiple.
  void (*accumulate)(const float* weights, KeyRange columns, const float* values, const float* rescale, float* sums,
                     int rows, int width);
};

/// The kernels of the best instruction set that this processor has.
const Kernels& kernels();

/// Written in C++ with the vector types of GCC and Clang, which they translate to any processor.
extern const Kernels portable_kernels;

}  // namespace mate::cpu
