// The inner loops of the CPU backend: the seam behind which each instruction set has its own. The algorithm is written
// once, in kernels/, over the vector operations that an instruction set supplies.
//
// Rows of queries fill the lanes of vectors, so matrices of scores are (block_keys, strip_rows): the softmax of each
// row runs down a column, and no lane ever waits for another. A row gets the same bits whatever its neighbours hold.
#pragma once

#include <cstdint>

#include "attention/problem.h"
#include "attention/visibility.h"

namespace mate::cpu {

/// Keys of a block: the rows of a matrix of scores.
inline constexpr int block_keys = 64;
/// Query rows that are worked on together: the columns of a matrix of scores.
inline constexpr int strip_rows = 64;
/// Most query rows that read their keys where they lie. Packing the keys would cost more than it saves.
inline constexpr int streamed_rows = 16;
/// Ranges of keys are rounded out to multiples of this, so that no product has a ragged edge. A score outside the true
/// range is that of another key, and masked.
inline constexpr int key_step = 8;
/// Rows that are read where they lie are multiplied so many keys at a time.
inline constexpr int dot_keys = 4;
/// Widths of float32 matrices are rounded up to a multiple of this: the floats of the widest vector.
inline constexpr int width_multiple = 16;

/// The rows of keys or values of one block and head, where they lie.
struct BlockRows {
  const char* const* rows = nullptr;  ///< (block_keys,): of some head
  std::int64_t offset = 0;            ///< bytes from there to the head

  const char* operator[](int key) const { return rows[key] + offset; }
};

/// The online softmax of query rows, in the base-2 domain: sum = sum_j 2**(score_j - max).
struct RunningSoftmax {
  float* max;
  float* sum;
};

/// The keys that query rows see: begin[row] <= key < begin[row] + count[row], as positions in a block.
struct VisibleKeys {
  const int* begin = nullptr;  ///< null: all keys
  const int* count = nullptr;
  int first_key = 0;  ///< of the block: what begin counts from lies so far before it
};

/// Products of packed operands, in lanes of 32 bits: a float32, or two bfloat16 that are neighbours in the dimension
/// that is summed over. Widths and strides of packed operands are in lanes.
struct PackedKernels {
  int numbers_per_lane;

  /// target (lanes of depth, strip_rows) = rows (count, stride)[:, :depth], float32, transposed. Columns up to the next
  /// multiple of width_multiple become 0.
  void (*pack_queries)(const float* rows, int stride, int count, int depth, float* target);

  /// target (block_keys, stride)[columns, lanes of depth] = the rows.
  void (*pack_keys)(ElementType type, BlockRows rows, KeyRange columns, int depth, float* target, int stride);

  /// target (block_keys / numbers_per_lane, stride)[columns, :width] = the rows.
  void (*pack_values)(ElementType type, BlockRows rows, KeyRange columns, int width, float* target, int stride);

  /// scores (block_keys, strip_rows)[columns, :rows] = keys (block_keys, depth) . queries (depth, strip_rows).
  void (*multiply_scores)(const float* keys, const float* queries, KeyRange columns, int rows, int depth,
                          float* scores);

  /// Takes the scores of `columns` in, multiplied by `scale`, at least 0, to the base-2 domain: hidden ones become 0,
  /// the others 2**(score - max), as a left operand of accumulate. rescale[row] is what the row's sums so far must be
  /// multiplied by.
  void (*update_softmax)(float* scores, KeyRange columns, const VisibleKeys& visible, float scale, int rows,
                         RunningSoftmax softmax, float* rescale);

  /// sums (rows, stride)[:, :width] = rescale (rows) * sums + weights[columns, :rows]^T . values[columns, :width].
  /// width is a multiple of width_multiple.
  void (*accumulate)(const float* weights, const float* values, KeyRange columns, const float* rescale, float* sums,
                     int rows, int width);
};

struct Kernels {
  const char* name;

  /// target[i] = factor * source[i], i < count.
  void (*widen)(ElementType type, const void* source, float factor, float* target, int count);

  /// target[i] = source[i] rounded to `type`.
  void (*narrow)(const float* source, ElementType type, void* target, int count);

  /// scores[columns, :rows] = softcap * tanh(scale * scores / softcap).
  void (*cap_scores)(float* scores, KeyRange columns, float scale, float softcap, int rows);

  /// scores[columns, :rows] becomes, or grows by, keys[columns, :depth] . queries (rows, stride)[:, :depth]^T, of keys
  /// that lie where they lie. Queries are 0 from `depth` to the next multiple of width_multiple.
  void (*dot_scores)(ElementType type, BlockRows keys, const float* queries, int stride, KeyRange columns, int rows,
                     int depth, bool add, float* scores);

  /// sums (rows, stride)[:, :width] becomes, or grows by, weights[columns, :rows]^T . values[columns, :width], of
  /// values that lie where they lie. Up to the next multiple of width_multiple, sums may be written too.
  void (*sum_values)(ElementType type, const float* weights, BlockRows values, KeyRange columns, bool add, float* sums,
                     int stride, int rows, int width);

  /// sums (rows, width) = rescale (rows) * sums + block. width is a multiple of width_multiple.
  void (*add_block)(const float* block, const float* rescale, float* sums, int rows, int width);

  PackedKernels float32;
  /// numbers_per_lane is 0 where the processor cannot multiply them.
  PackedKernels bfloat16;
};

/// The kernels of the best instruction set that this processor has, or of the one that MATE_CPU_ISA names. Throws
/// mate::Error (value) where this processor lacks that one.
const Kernels& kernels();

}  // namespace mate::cpu
