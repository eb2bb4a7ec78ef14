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

/// Two elements of 16 bits as float32.
template <ElementType element>
__device__ inline float2 unpack(unsigned word) {
  if constexpr (element == ElementType::float16) return widen_halves(word);
  return make_float2(__int_as_float(word << 16), __int_as_float(word & 0xffff0000U));
}

/// One element of a type that is known when the kernel runs, given its bits, as float32. Without branches.
__device__ inline float widen_bits(unsigned bits, ElementType type) {
  const float of_half = widen_halves(type == ElementType::float8_e4m3 ? widen_e4m3(bits) : bits).x;
  const unsigned wide = type == ElementType::bfloat16 ? bits << 16 : bits;
  return type == ElementType::bfloat16 || type == ElementType::float32 ? __int_as_float(wide) : of_half;
}

/// The same, read from memory, with a branch for each type.
__device__ inline float widen(const void* element, ElementType type) {
  if (type == ElementType::float32) return *static_cast<const float*>(element);
  if (type == ElementType::float8_e4m3) {
    return widen_bits(*static_cast<const unsigned char*>(element), ElementType::float8_e4m3);
  }
  const auto bits = *static_cast<const unsigned short*>(element);
  if (type == ElementType::bfloat16) return widen_bits(bits, ElementType::bfloat16);
  return widen_bits(bits, ElementType::float16);
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
