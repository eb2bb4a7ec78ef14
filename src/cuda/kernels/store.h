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

/// Writes the parts of row i that this thread holds, times `factor`, where `row` is not null. `wide`: rows are aligned
/// to 16 bytes. All lanes of a warp call it.
template <ElementType element, int columns>
__device__ inline void store_row(const float (&values)[columns / 2], int i, float factor, void* row, int head_dim,
                                 bool wide) {
  const auto word = [&](int j) {
    return pack<element>(values[4 * j + 2 * i] * factor, values[4 * j + 2 * i + 1] * factor);
  };
  auto* const elements = static_cast<unsigned short*>(row);
  // Compared with what is left of the row, columns are constants.
  const int left = row == nullptr ? 0 : head_dim;
  if (wide) {
    const int lane = threadIdx.x % 4;
#pragma unroll
    for (int j = 0; j + 4 <= columns / 8; j += 4) {
      unsigned words[4] = {word(j), word(j + 1), word(j + 2), word(j + 3)};
      transpose_quad(words);
      if (8 * j < left - 8 * lane) {
        *reinterpret_cast<uint4*>(elements + 8 * j + 8 * lane) = make_uint4(words[0], words[1], words[2], words[3]);
      }
    }
#pragma unroll
    for (int j = columns / 32 * 4; j < columns / 8; ++j) {
      if (8 * j < left) *reinterpret_cast<unsigned*>(elements + 8 * j + 2 * lane) = word(j);
    }
  } else {
#pragma unroll
    for (int j = 0; j < columns / 8; ++j) {
      const int column = 8 * j + accumulator_column();
      const unsigned both = word(j);
      if (column < left) elements[column] = static_cast<unsigned short>(both);
      if (column + 1 < left) elements[column + 1] = static_cast<unsigned short>(both >> 16);
    }
  }
}

}  // namespace mate::cuda
