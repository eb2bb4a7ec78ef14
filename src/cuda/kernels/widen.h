// e4m3 as elements of 16 bits, without loss.
#pragma once

#include "element.h"

namespace mate::cuda {

/// Two elements, the first of which is in the low byte.
template <ElementType element>
__device__ inline unsigned widen_pair(unsigned short pair) {
  const unsigned halves = widen_e4m3(pair);
  if constexpr (element == ElementType::float16) return halves;
  const float2 wide = widen_halves(halves);
  return pack<element>(wide.x, wide.y);
}

/// Sixteen elements, in order.
template <ElementType element>
__device__ inline void widen_piece(uint4 piece, uint4 (&halves)[2]) {
  const unsigned words[4] = {piece.x, piece.y, piece.z, piece.w};
  unsigned wide[8];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    wide[2 * i] = widen_pair<element>(static_cast<unsigned short>(words[i]));
    wide[2 * i + 1] = widen_pair<element>(static_cast<unsigned short>(words[i] >> 16));
  }
  halves[0] = make_uint4(wide[0], wide[1], wide[2], wide[3]);
  halves[1] = make_uint4(wide[4], wide[5], wide[6], wide[7]);
}

/// `count` bytes of global memory, up to 16, and zeros behind them. Rows are aligned to `alignment` bytes, which divide
/// `count`.
__device__ inline uint4 read_piece(const unsigned char* source, int count, int alignment) {
  if (alignment == 16) return *reinterpret_cast<const uint4*>(source);
  unsigned words[4] = {};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if (alignment >= 4) {
      if (4 * i < count) words[i] = *reinterpret_cast<const unsigned*>(source + 4 * i);
    } else {
#pragma unroll 1
      for (int j = 0; j < 4; ++j) {
        const unsigned byte = 4 * i + j < count ? source[4 * i + j] : 0;
        words[i] |= byte << 8 * j;
      }
    }
  }
  return make_uint4(words[0], words[1], words[2], words[3]);
}

}  // namespace mate::cuda
