// Conversions of elements.
#pragma once

#include "attention/problem.h"

namespace mate::cuda {

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

/// One element of a type that is known when the kernel runs, as float32.
__device__ inline float widen(const void* element, ElementType type) {
  if (type == ElementType::float32) return *static_cast<const float*>(element);
  const auto bits = *static_cast<const unsigned short*>(element);
  if (type == ElementType::bfloat16) return __int_as_float(bits << 16);
  float wide;
  asm("cvt.f32.f16 %0, %1;" : "=f"(wide) : "h"(bits));
  return wide;
}

}  // namespace mate::cuda
