// Conversions between float32 and what is smaller, rounded to nearest, ties to even. The first of several elements is
// in the low bits.
#pragma once

namespace mate::cuda::ptx {

__device__ inline unsigned pack_bfloat16(float first, float second) {
  unsigned packed;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(second), "f"(first));
  return packed;
}

__device__ inline unsigned pack_float16(float first, float second) {
  unsigned packed;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(second), "f"(first));
  return packed;
}

/// Four e4m3, which saturate to the largest number, and keep NaN.
__device__ inline unsigned pack_e4m3(float first, float second, float third, float fourth) {
  unsigned packed;
  asm("{\n.reg .b16 low, high;\ncvt.rn.satfinite.e4m3x2.f32 low, %2, %1;\ncvt.rn.satfinite.e4m3x2.f32 high, %4, %3;\n"
      "mov.b32 %0, {low, high};\n}"
      : "=r"(packed)
      : "f"(first), "f"(second), "f"(third), "f"(fourth));
  return packed;
}

/// One of them.
__device__ inline unsigned char round_to_e4m3(float value) {
  unsigned short pair;
  asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(pair) : "f"(0.0F), "f"(value));
  return static_cast<unsigned char>(pair);
}

/// Two e4m3 as float16, without loss.
__device__ inline unsigned widen_e4m3(unsigned short pair) {
  unsigned halves;
  asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(halves) : "h"(pair));
  return halves;
}

/// Four of them.
__device__ inline uint2 widen_e4m3_of_word(unsigned word) {
  uint2 halves;
  asm("{\n.reg .b16 low, high;\nmov.b32 {low, high}, %2;\ncvt.rn.f16x2.e4m3x2 %0, low;\n"
      "cvt.rn.f16x2.e4m3x2 %1, high;\n}"
      : "=r"(halves.x), "=r"(halves.y)
      : "r"(word));
  return halves;
}

/// Two float16 as float32.
__device__ inline float2 widen_halves(unsigned halves) {
  float2 wide;
  asm("{\n.reg .b16 low, high;\nmov.b32 {low, high}, %2;\ncvt.f32.f16 %0, low;\ncvt.f32.f16 %1, high;\n}"
      : "=f"(wide.x), "=f"(wide.y)
      : "r"(halves));
  return wide;
}

}  // namespace mate::cuda::ptx
