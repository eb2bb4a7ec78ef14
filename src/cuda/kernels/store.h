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

/// Writes the parts of row i that this thread holds, times `factor` (0 gives 0, whatever they are), where `row` is not
/// null. Whole pieces of 16 bytes where `wide`: rows are then aligned to them. All lanes of a warp call it.
template <ElementType element, int columns>
__device__ inline void store_row(const float (&values)[columns / 2], int i, float factor, void* row, int head_dim,
                                 bool wide) {
  constexpr int groups = columns / 8;
  unsigned words[groups];
#pragma unroll
  for (int j = 0; j < groups; ++j) {
    const float first = values[4 * j + 2 * i] * factor;
    const float second = values[4 * j + 2 * i + 1] * factor;
    words[j] = factor == 0 ? 0 : pack<element>(first, second);
  }
  auto* const elements = static_cast<unsigned short*>(row);
  const auto store_word = [&](int j) {
    const int column = 8 * j + accumulator_column();
    if (row == nullptr) return;
    if (column < head_dim) elements[column] = static_cast<unsigned short>(words[j]);
    if (column + 1 < head_dim) elements[column + 1] = static_cast<unsigned short>(words[j] >> 16);
  };
  if (!wide) {
#pragma unroll
    for (int j = 0; j < groups; ++j) store_word(j);
    return;
  }
#pragma unroll
  for (int j = 0; j + 4 <= groups; j += 4) {
    unsigned four[4] = {words[j], words[j + 1], words[j + 2], words[j + 3]};
    transpose_quad(four);
    const int column = 8 * (j + static_cast<int>(threadIdx.x % 4));
    if (row != nullptr && column < head_dim) {
      *reinterpret_cast<uint4*>(elements + column) = make_uint4(four[0], four[1], four[2], four[3]);
    }
  }
#pragma unroll
  for (int j = groups / 4 * 4; j < groups; ++j) {
    const int column = 8 * j + accumulator_column();
    if (row != nullptr && column < head_dim) *reinterpret_cast<unsigned*>(elements + column) = words[j];
  }
}

}  // namespace mate::cuda
