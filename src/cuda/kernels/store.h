// From an accumulator to rows of out in global memory.
#pragma once

#include "accumulator.h"
#include "element.h"

namespace mate::cuda {

/// Four lanes of a quad each hold one word of each of four things; afterwards lane i of the quad holds all words of the
/// i-th.
__device__ inline void transpose_quad(unsigned (&words)[4]) {
  const bool odd = threadIdx.x % 2 != 0;
  const bool upper = threadIdx.x / 2 % 2 != 0;
#pragma unroll
  for (int i = 0; i < 4; i += 2) {
    const unsigned got = __shfl_xor_sync(~0U, odd ? words[i] : words[i + 1], 1);
    words[i] = odd ? got : words[i];
    words[i + 1] = odd ? words[i + 1] : got;
  }
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const unsigned got = __shfl_xor_sync(~0U, upper ? words[i] : words[i + 2], 2);
    words[i] = upper ? got : words[i];
    words[i + 2] = upper ? words[i + 2] : got;
  }
}

/// Writes the parts of its rows that this thread holds, each times its factor, where a row is not null. `wide`: rows
/// are aligned to 16 bytes. All lanes of a warp call it.
template <ElementType element, int columns>
__device__ inline void store_rows(const float (&values)[columns / 2], const float (&factors)[rows_of_thread],
                                  unsigned short* const (&rows)[rows_of_thread], int head_dim, bool wide) {
  const auto word = [&](int i, int j) {
    return pack<element>(values[4 * j + 2 * i] * factors[i], values[4 * j + 2 * i + 1] * factors[i]);
  };
  // Compared with what is left of the row from this lane's first on, columns are constants.
  const auto left_from = [&](int i, int column) { return rows[i] == nullptr ? 0 : head_dim - column; };
  const int lane = threadIdx.x % 4;
  if (wide) {
#pragma unroll
    for (int i = 0; i < rows_of_thread; ++i) {
      unsigned short* const row = rows[i] + 8 * lane;
      const int left = left_from(i, 8 * lane);
#pragma unroll
      for (int j = 0; j + 4 <= columns / 8; j += 4) {
        unsigned words[4] = {word(i, j), word(i, j + 1), word(i, j + 2), word(i, j + 3)};
        transpose_quad(words);
        if (8 * j < left) {
          *reinterpret_cast<uint4*>(row + 8 * j) = make_uint4(words[0], words[1], words[2], words[3]);
        }
      }
#pragma unroll
      for (int j = columns / 32 * 4; j < columns / 8; ++j) {
        if (8 * j < left_from(i, 0)) *reinterpret_cast<unsigned*>(rows[i] + 8 * j + 2 * lane) = word(i, j);
      }
    }
  } else {
#pragma unroll
    for (int i = 0; i < rows_of_thread; ++i) {
      unsigned short* const row = rows[i] + 2 * lane;
      const int left = left_from(i, 2 * lane);
#pragma unroll
      for (int j = 0; j < columns / 8; ++j) {
        const unsigned both = word(i, j);
        if (8 * j < left) row[8 * j] = static_cast<unsigned short>(both);
        if (8 * j + 1 < left) row[8 * j + 1] = static_cast<unsigned short>(both >> 16);
      }
    }
  }
}

}  // namespace mate::cuda
