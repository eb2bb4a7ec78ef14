// A block of values of e4m3, transposed in shared memory.
#pragma once

#include "load.h"
#include "ptx/shared.h"

namespace mate::cuda {

/// Makes of a tile of `keys` rows of `columns` values one of as many rows of keys: of each column, the value of every
/// key. Keys of every 16 lie in the order in which a thread holds their scores, so that four weights of a lane meet
/// adjacent values: key 8 h + 2 t + c, of lane t of a quad, is in place 4 t + 2 h + c. Each of `warps` warps takes
/// pieces of 16 columns of its own, from first_piece() to end_piece().
template <int keys, int columns, int warps>
struct Transposition {
  static_assert(keys % 32 == 0 && columns % 16 == 0);
  static constexpr int pieces = columns / 16;
  static constexpr int pieces_of_warp = (pieces + warps - 1) / warps;

  __device__ static int first_piece(int warp) { return warp * pieces_of_warp; }
  __device__ static int end_piece(int warp) { return min(first_piece(warp) + pieces_of_warp, pieces); }

  __device__ static void run(const unsigned char* from, unsigned char* to, int warp) {
    constexpr int at_once = pieces_of_warp < 4 ? pieces_of_warp : 4;
    // What follows from the lane is not worth registers all along.
    const int lane = ptx::known_only_here(static_cast<int>(threadIdx.x % 32));
    // Four matrices of 8 keys and 16 columns are loaded, two columns being an element: a lane gets both of two keys. It
    // gathers those of one column from two matrices, and then those of the other. Lanes of the lower half of a matrix
    // take the even column first: what is stored at one time is then in rows whose places in the swizzle all differ.
    const bool lower = lane < 16;
    const unsigned first_column = lower ? 0x6420 : 0x7531;  // bytes of two words
    const unsigned second_column = lower ? 0x7531 : 0x6420;
    // Where this lane stores: matrix lane / 8 is of the columns taken first or second, and of 16 keys lane / 16.
    const int row = lane % 8;
    const int column = 2 * row + ((row >= 4) != (lane / 8 % 2 != 0));
    const unsigned target_of_lane = ptx::shared_address(to) + piece_offset<columns>(column, lane / 16);
    const unsigned source_of_lane = ptx::shared_address(from) + piece_offset<keys>(lane, 0);
    const int end = end_piece(warp);
#pragma unroll 1
    for (int first = first_piece(warp); first < end; first += at_once) {
      unsigned sources[at_once];
#pragma unroll
      for (int j = 0; j < at_once; ++j) {
        // A warp that has fewer takes its last one again, and never one that another warp clears.
        const int piece = min(first + j, end - 1);
        sources[j] = (source_of_lane ^ piece % 8 * 16) + piece / 8 * keys * chunk_row_bytes;
      }
#pragma unroll 1
      for (int key = 0; key < keys; key += 32) {
        const unsigned target =
            (target_of_lane ^ key / 16 % 8 * 16) + key / chunk_row_bytes * columns * chunk_row_bytes;
        unsigned pairs[at_once][4];
#pragma unroll
        for (int j = 0; j < at_once; ++j) {
          ptx::load_matrices_transposed(sources[j] + key * chunk_row_bytes, pairs[j]);
        }
#pragma unroll
        for (int j = 0; j < at_once; ++j) {
          const unsigned words[4] = {__byte_perm(pairs[j][0], pairs[j][1], first_column),
                                     __byte_perm(pairs[j][0], pairs[j][1], second_column),
                                     __byte_perm(pairs[j][2], pairs[j][3], first_column),
                                     __byte_perm(pairs[j][2], pairs[j][3], second_column)};
          ptx::store_matrices(target + min(first + j, end - 1) * 16 * chunk_row_bytes, words);
        }
      }
    }
  }
};

}  // namespace mate::cuda
