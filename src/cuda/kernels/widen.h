// e4m3 as elements of 16 bits, without loss, and bfloat16 as float16, to meet it.
#pragma once

#include "element.h"

namespace mate::cuda {

/// Four elements, the first of which is in the lowest byte.
template <ElementType element>
__device__ inline uint2 widen_word(unsigned word) {
  const uint2 halves = ptx::widen_e4m3_of_word(word);
  if constexpr (element == ElementType::float16) return halves;
  const float2 low = widen_halves(halves.x);
  const float2 high = widen_halves(halves.y);
  return make_uint2(pack<element>(low.x, low.y), pack<element>(high.x, high.y));
}

/// Sixteen elements, in order.
template <ElementType element>
__device__ inline void widen_piece(uint4 piece, uint4 (&halves)[2]) {
  const unsigned words[4] = {piece.x, piece.y, piece.z, piece.w};
  unsigned wide[8];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const uint2 both = widen_word<element>(words[i]);
    wide[2 * i] = both.x;
    wide[2 * i + 1] = both.y;
  }
  halves[0] = make_uint4(wide[0], wide[1], wide[2], wide[3]);
  halves[1] = make_uint4(wide[4], wide[5], wide[6], wide[7]);
}

/// Of a number that is not negative: 2 to that times a number from 1 to 2, if it is not too small.
__device__ inline int exponent_of(float number) { return (__float_as_int(number) >> 23) - 127; }
/// Of an exponent from -126 to 127.
__device__ inline float power_of_two(int exponent) { return __int_as_float((127 + exponent) << 23); }

/// How numbers become float16: divided by a power of two so that the largest of them fits. What is then too small for
/// float16 is so beside that one.
class Float16Fit {
 public:
  /// 2**14 times a number from 1 to 2 is a float16; the power and its reciprocal are normal numbers.
  __device__ explicit Float16Fit(float largest) : exponent_(max(exponent_of(largest), -112) - 14) {}

  __device__ float divisor() const { return power_of_two(exponent_); }
  __device__ unsigned round(float2 pair) const {
    const float multiplier = power_of_two(-exponent_);
    return pack<ElementType::float16>(pair.x * multiplier, pair.y * multiplier);
  }

 private:
  int exponent_;
};

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
