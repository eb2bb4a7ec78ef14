// Conversions of elements.
#pragma once

#include "attention/problem.h"

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

/// Two float32 rounded to the type, the first in the low half.
template <ElementType element>
__device__ inline unsigned pack(float first, float second) {
  unsigned packed;
  if constexpr (element == ElementType::bfloat16) {
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(second), "f"(first));
  } else {
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(second), "f"(first));
  }
  return packed;
}

/// Four float32 rounded to e4m3, the first in the low byte.
__device__ inline unsigned pack_e4m3(float first, float second, float third, float fourth) {
  unsigned packed;
  asm("{\n.reg .b16 low, high;\ncvt.rn.satfinite.e4m3x2.f32 low, %2, %1;\ncvt.rn.satfinite.e4m3x2.f32 high, %4, %3;\n"
      "mov.b32 %0, {low, high};\n}"
      : "=r"(packed)
      : "f"(first), "f"(second), "f"(third), "f"(fourth));
  return packed;
}

/// Two elements of e4m3 as float16, the first of which is in the low byte.
__device__ inline unsigned widen_e4m3(unsigned short pair) {
  unsigned halves;
  asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(halves) : "h"(pair));
  return halves;
}

/// Two elements of float16 as float32.
__device__ inline float2 widen_halves(unsigned halves) {
  float2 wide;
  asm("{\n.reg .b16 low, high;\nmov.b32 {low, high}, %2;\ncvt.f32.f16 %0, low;\ncvt.f32.f16 %1, high;\n}"
      : "=f"(wide.x), "=f"(wide.y)
      : "r"(halves));
  return wide;
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
    unsigned short pair;
    asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(pair) : "f"(0.0F), "f"(value));
    *static_cast<unsigned char*>(element) = static_cast<unsigned char>(pair);
  } else {
    *static_cast<unsigned short*>(element) = static_cast<unsigned short>(pack<type>(value, 0));
  }
}

}  // namespace mate::cuda
