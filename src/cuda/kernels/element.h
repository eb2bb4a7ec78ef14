// Conversions of elements.
#pragma once

#include "attention/problem.h"
#include "ptx/convert.h"

namespace mate::cuda {

/// An element of one or two bytes, for who copies bits.
template <int bytes>
struct BitsOf {
  using Type = unsigned short;
};
template <>
struct BitsOf<1> {
  using Type = unsigned char;
};

using ptx::pack_e4m3;
using ptx::widen_e4m3;
using ptx::widen_halves;

/// Two float32 rounded to the type, the first in the low half.
template <ElementType element>
__device__ inline unsigned pack(float first, float second) {
  if constexpr (element == ElementType::bfloat16) return ptx::pack_bfloat16(first, second);
  return ptx::pack_float16(first, second);
}

/// One element of a type that is known when the kernel runs, as float32.
__device__ inline float widen(const void* element, ElementType type) {
  if (type == ElementType::float32) return *static_cast<const float*>(element);
  if (type == ElementType::float8_e4m3) {
    return widen_halves(widen_e4m3(*static_cast<const unsigned char*>(element))).x;
  }
  const auto bits = *static_cast<const unsigned short*>(element);
  if (type == ElementType::bfloat16) return __int_as_float(bits << 16);
  return widen_halves(bits).x;
}

/// Rounds float32 to an element. e4m3 saturates to its largest number, and keeps NaN.
template <ElementType type>
__device__ inline void narrow(float value, void* element) {
  if constexpr (type == ElementType::float8_e4m3) {
    *static_cast<unsigned char*>(element) = ptx::round_to_e4m3(value);
  } else {
    *static_cast<unsigned short*>(element) = static_cast<unsigned short>(pack<type>(value, 0));
  }
}

}  // namespace mate::cuda
