// The first operands of transposed products (stream.h, transposed.h), which a warp takes from shared memory into
// registers: 16 keys by 16 columns, or 16 columns of values by 16 keys. A lane, with g = lane / 4 and t = lane % 4, has
// rows g and g + 8 of them, and of each, in order, the columns from 2 t on and those from 2 t + 8 on.
//
// Which column of a head is which of a product's does not matter as long as both operands agree, so that a lane takes
// 16 bytes side by side of a key. Which key is which of eight does not either: they are ordered so that no two lanes
// read from one bank.
#pragma once

#include "softmax.h"
#include "widen.h"

namespace mate::cuda {

/// So many bytes, side by side in memory.
template <int bytes>
struct PieceOf;
template <>
struct PieceOf<16> {
  using Type = uint4;
};
template <>
struct PieceOf<8> {
  using Type = uint2;
};
template <>
struct PieceOf<4> {
  using Type = unsigned;
};
__device__ inline unsigned word_of(const uint4& piece, int i) {
  return i == 0 ? piece.x : i == 1 ? piece.y : i == 2 ? piece.z : piece.w;
}
__device__ inline unsigned word_of(const uint2& piece, int i) { return i == 0 ? piece.x : piece.y; }
__device__ inline unsigned word_of(unsigned piece, int) { return piece; }

// A lane's place in products.
__device__ inline int lane_row() { return static_cast<int>(threadIdx.x % 32 / 4); }
__device__ inline int lane_step() { return static_cast<int>(threadIdx.x % 4); }

/// The key that is number n of eight.
__device__ inline int key_of(int n) { return ((n ^ n >> 2) & 1) << 2 | (n & 2) | n >> 2; }
/// Key i, of four, that a lane has of 16 keys in an operand of values: 2 t and 2 t + 1 of both eights.
__device__ inline int key_of_values(int i) { return i / 2 * 8 + (key_of(2 * lane_step()) ^ i % 2 * 4); }
/// The keys that a lane has scores of.
__device__ inline ScoreColumns score_columns() { return {key_of(lane_row()), 8, 16}; }

/// Makes operands of values of e4m3, whose elements no instruction transposes: of some words of pieces of the lane's
/// four keys, each of columns side by side. Operand i is of columns 2 i and 2 i + 1 of these words of every lane's.
template <ElementType element, int first_word, int words, typename Piece>
__device__ inline void widen_values(const Piece (&keys)[4], unsigned (&operands)[2 * words][4]) {
#pragma unroll
  for (int word = 0; word < words; ++word) {
    // Two columns of both keys of eight in a word, the next two in another.
    unsigned pairs[2][2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const unsigned even = word_of(keys[2 * half], first_word + word);
      const unsigned odd = word_of(keys[2 * half + 1], first_word + word);
      pairs[0][half] = __byte_perm(even, odd, 0x5140);
      pairs[1][half] = __byte_perm(even, odd, 0x7362);
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const uint2 both = widen_word<element>(pairs[i][half]);
        operands[2 * word + i][2 * half] = both.x;
        operands[2 * word + i][2 * half + 1] = both.y;
      }
    }
  }
}

}  // namespace mate::cuda
