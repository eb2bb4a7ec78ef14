// The products of a warp that has keys of its own, of the kernel of stream.h: how their operands come from shared
// memory into registers, and where the results lie.
//
// Query rows are few, so that they are the columns of products, 8 or 16 of them: scores are keys x queries, transposed,
// 16 keys by 8 rows a product, and sums are values, transposed, x weights, 16 columns of values by 8 rows. A lane, with
// g = lane / 4 and t = lane % 4, has of both rows 2 t and 2 t + 1 of every eight.
//
// How lanes take operands is told in transposed_operands.h. Rows of a warp in a tile begin where the pattern of a
// swizzled tile does.
#pragma once

#include "forward_variant.h"
#include "load.h"
#include "ptx/mma.h"
#include "ptx/shared.h"
#include "transposed_operands.h"

namespace mate::cuda {

/// Where the rows of a warp are in a block of keys that is in boxes of `box_keys` rows, each of them in `chunks`
/// chunks: in bytes. Boxes begin where the pattern of a swizzled tile does. A warp has rows of one box, or of two where
/// these have no more than eight rows; where rows are gathered, a block is one box.
template <ForwardVariant variant, int chunks>
class RowsOfWarp {
 public:
  __device__ RowsOfWarp(int first_row, int box_keys) {
    if constexpr (in_order) {
      first_ = first_row * chunk_row_bytes;
    } else {
      const int box = divide(first_row, box_keys);
      chunk_ = box_keys * chunk_row_bytes;
      first_ = box * chunks * chunk_ + (first_row - box * box_keys) * chunk_row_bytes;
      eight_ = box_keys > 8 ? 8 * chunk_row_bytes : chunks * chunk_;
    }
  }

  /// Of a row and chunk, where the row is a multiple of eight.
  __device__ int offset(int row, int chunk) const {
    if constexpr (in_order) return first_ + row * chunk_row_bytes + chunk * variant.block_keys * chunk_row_bytes;
    return first_ + row / 8 * eight_ + chunk * chunk_;
  }
  /// Of a piece of 16 bytes.
  __device__ int piece(int row, int piece) const {
    return offset(row / 8 * 8, piece / 8) + static_cast<int>(piece_offset<8>(row % 8, piece % 8));
  }
  __device__ int byte(int row, int byte) const { return piece(row, byte / 16) + byte % 16; }

 private:
  /// Whether rows of all boxes are side by side.
  static constexpr bool in_order = variant.gather || chunks == 1;

  int first_;
  int eight_ = 0;  ///< from eight rows to the next
  int chunk_ = 0;
};

template <ForwardVariant variant>
class StreamProducts {
 public:
  static constexpr int keys = variant.block_keys / variant.stream_warps();  // of a warp
  static constexpr int row_tiles = variant.tile_rows() / 8;                 // of eight query rows
  static constexpr int column_tiles = variant.head_dim_v / 16;              // of values
  static constexpr int steps = variant.head_dim / 16;                       // of a product with keys
  /// What a lane takes of a key at once.
  static constexpr int piece_columns = 16 / variant.key_bytes();
  static constexpr int pieces = variant.head_dim / (4 * piece_columns);
  static constexpr int piece_words = piece_columns / 2;
  static_assert((variant.gather ? keys % 16 == 0 : keys == 16) && variant.head_dim % (4 * piece_columns) == 0);

  using KeyRows = RowsOfWarp<variant, chunks_of(variant.head_dim, variant.key_bytes())>;
  using ValueRows = RowsOfWarp<variant, chunks_of(variant.head_dim_v, variant.key_bytes())>;

  using Queries = unsigned[row_tiles][steps][2];
  /// Of eight query rows: of every 16 keys, two scores of a lane's first row, then of its second.
  using Scores = float[keys / 4];
  using Sums = float[column_tiles][row_tiles][4];

  /// The first column of piece i.
  __device__ static int column_of_piece(int i) { return piece_columns * (4 * i + lane_step()); }

  /// scores = keys x queries, transposed.
  __device__ static void multiply(const Queries& queries, const unsigned char* tile, const KeyRows& rows,
                                  Scores (&scores)[row_tiles]) {
    const int key = key_of(lane_row());
#pragma unroll
    for (int j = 0; j < keys / 16; ++j) {
      // Products that add to the same sums wait for each other.
      float products[row_tiles][2][4] = {};
#pragma unroll
      for (int i = 0; i < pieces; ++i) {
        unsigned words[2][piece_words];
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          load_piece(tile + rows.piece(16 * j + 8 * half + key, 4 * i + lane_step()), words[half]);
        }
#pragma unroll
        for (int k = 0; k < piece_words / 2; ++k) {
          const unsigned a[4] = {words[0][2 * k], words[1][2 * k], words[0][2 * k + 1], words[1][2 * k + 1]};
          const int step = piece_words / 2 * i + k;
#pragma unroll
          for (int r = 0; r < row_tiles; ++r) {
            ptx::mma<element>(products[r][step % 2], a, queries[r][step][0], queries[r][step][1]);
          }
        }
      }
#pragma unroll
      for (int r = 0; r < row_tiles; ++r) {
#pragma unroll
        for (int i = 0; i < 4; ++i) scores[r][4 * j + i % 2 * 2 + i / 2] = products[r][0][i] + products[r][1][i];
      }
    }
  }

  /// sums += values, transposed, x weights.
  __device__ static void add_values(const unsigned char* tile, const ValueRows& rows,
                                    const Scores (&weights)[row_tiles], Sums& sums) {
#pragma unroll
    for (int step = 0; step < keys / 16; ++step) {
      unsigned b[row_tiles][2];
#pragma unroll
      for (int r = 0; r < row_tiles; ++r) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const float* const of_lane = weights[r] + 4 * step + half;
          b[r][half] = ptx::transpose_matrix(pack<element>(of_lane[0], of_lane[2]));
        }
      }
      const auto add = [&](int column_tile, const unsigned(&a)[4]) {
#pragma unroll
        for (int r = 0; r < row_tiles; ++r) ptx::mma<element>(sums[column_tile][r], a, b[r][0], b[r][1]);
      };
      if constexpr (variant.scaled()) {
        for_widened_values(tile, rows, step, add);
      } else {
        for_values(tile, rows, step, add);
      }
    }
  }

  /// Multiplies the sums of a lane's rows of eight.
  __device__ static void scale(Sums& sums, int row_tile, const float (&factor)[rows_of_thread]) {
#pragma unroll
    for (auto& of_tile : sums) {
#pragma unroll
      for (int i = 0; i < 4; ++i) of_tile[row_tile][i] *= factor[i % 2];
    }
  }

  /// Stores sums to `rows`, one for each query row.
  __device__ static void store(const Sums& sums, float (*rows)[variant.sums_pitch()]) {
#pragma unroll
    for (int i = 0; i < row_tiles; ++i) {
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        float* const row = rows[8 * i + 2 * lane_step() + c];
        if constexpr (variant.scaled()) {
#pragma unroll
          for (int j = 0; j < column_tiles; j += 2) {
            float* const columns = row + widened_column(j);
            *reinterpret_cast<float4*>(columns) =
                make_float4(sums[j][i][c], sums[j][i][2 + c], sums[j + 1][i][c], sums[j + 1][i][2 + c]);
          }
        } else {
#pragma unroll
          for (int j = 0; j < column_tiles; ++j) {
            row[16 * j + lane_row()] = sums[j][i][c];
            row[16 * j + lane_row() + 8] = sums[j][i][2 + c];
          }
        }
      }
    }
  }

 private:
  static constexpr ElementType element = variant.element();

  __device__ static void load_piece(const unsigned char* source, unsigned (&words)[piece_words]) {
    const auto piece = *reinterpret_cast<const uint4*>(source);
    if constexpr (variant.scaled()) {
      uint4 halves[2];
      widen_piece<element>(piece, halves);
#pragma unroll
      for (int i = 0; i < piece_words; ++i) words[i] = word_of(halves[i / 4], i % 4);
    } else {
#pragma unroll
      for (int i = 0; i < piece_words; ++i) words[i] = word_of(piece, i);
    }
  }

  /// Calls add(column_tile, a) with the values, transposed, of 16 keys.
  template <typename Add>
  __device__ static void for_values(const unsigned char* tile, const ValueRows& rows, int step, const Add& add) {
    const int lane = threadIdx.x % 32;
    // Matrices of 8 by 8 are of the first eight keys, then of the others; the second of two is of the columns behind.
    const int row = 16 * step + lane / 16 * 8 + key_of(lane % 8);
    const auto* const first = tile + rows.piece(row, lane / 8 % 2);
    // What follows from it would otherwise be kept in registers, for each of the places of a swizzled piece.
    const int address = ptx::known_only_here(static_cast<int>(ptx::shared_address(first)));
    constexpr int tiles_of_chunk = chunk_columns / 16;
    const int chunk_bytes = rows.offset(0, 1) - rows.offset(0, 0);
#pragma unroll
    for (int j = 0; j < column_tiles; ++j) {
      unsigned a[4];
      ptx::load_matrices_transposed((address ^ j % tiles_of_chunk * 32) + j / tiles_of_chunk * chunk_bytes, a);
      add(j, a);
    }
  }

  // Of e4m3, whose elements no instruction transposes, a lane takes so many columns of a key, side by side.
  static constexpr int widened_columns = variant.head_dim_v < 128 ? 8 : 16;
  static constexpr int tiles_of_widened = widened_columns / 2;
  __device__ static int widened_column(int column_tile) {
    return (column_tile / tiles_of_widened * 8 + lane_row()) * widened_columns + column_tile % tiles_of_widened * 2;
  }

  template <typename Add>
  __device__ static void for_widened_values(const unsigned char* tile, const ValueRows& of_warp, int step,
                                            const Add& add) {
    static_assert(variant.head_dim_v % (8 * widened_columns) == 0);
    using Piece = typename PieceOf<widened_columns>::Type;
#pragma unroll
    for (int round = 0; round < column_tiles / tiles_of_widened; ++round) {
      Piece keys[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int byte = (round * 8 + lane_row()) * widened_columns;
        keys[i] = *reinterpret_cast<const Piece*>(tile + of_warp.byte(16 * step + key_of_values(i), byte));
      }
      unsigned operands[tiles_of_widened][4];
      widen_values<element, 0, tiles_of_widened / 2>(keys, operands);
#pragma unroll
      for (int i = 0; i < tiles_of_widened; ++i) add(tiles_of_widened * round + i, operands[i]);
    }
  }
};

}  // namespace mate::cuda
