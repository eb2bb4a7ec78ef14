// Conversions between float32 and the narrower types, in arithmetic that compilers vectorise. All round to nearest
// even; e4m3 saturates to its largest number, 448, and keeps NaN.
#pragma once

#include <array>
#include <bit>
#include <cmath>
#include <cstdint>

namespace mate::cpu {

inline float widen_bfloat16(std::uint16_t bits) { return std::bit_cast<float>(std::uint32_t{bits} << 16); }

inline std::uint16_t narrow_bfloat16(float value) {
  const std::uint32_t bits = std::bit_cast<std::uint32_t>(value);
  const std::uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const std::uint32_t quiet_nan = (bits >> 16) | 0x40;
  return static_cast<std::uint16_t>((bits & 0x7fffffff) > 0x7f800000 ? quiet_nan : rounded);
}

inline float widen_float16(std::uint16_t bits) {
  // The exponent is moved to float32's bias by a multiplication, which turns subnormal numbers into normal ones.
  const std::uint32_t magnitude = (bits & 0x7fffU) << 13;
  const float scaled = std::bit_cast<float>(magnitude) * 0x1p112F;
  const std::uint32_t special = magnitude | 0x7f800000;
  const std::uint32_t value = (bits & 0x7c00) == 0x7c00 ? special : std::bit_cast<std::uint32_t>(scaled);
  return std::bit_cast<float>(value | std::uint32_t{bits & 0x8000U} << 16);
}

inline std::uint16_t narrow_float16(float value) {
  const std::uint32_t bits = std::bit_cast<std::uint32_t>(value);
  const std::uint32_t magnitude = bits & 0x7fffffff;
  // Subnormal results: adding 0.5 puts the last bit that float16 keeps, 2**-24, at the end of a float32's mantissa.
  const float shifted = std::bit_cast<float>(magnitude) + 0.5F;
  const std::uint32_t subnormal = std::bit_cast<std::uint32_t>(shifted) - 0x3f000000;
  const std::uint32_t normal = (magnitude + 0xfff + ((magnitude >> 13) & 1) - (112U << 23)) >> 13;
  const std::uint32_t special = magnitude > 0x7f800000 ? 0x7e00 : 0x7c00;
  const std::uint32_t finite = magnitude < 0x38800000 ? subnormal : normal;
  return static_cast<std::uint16_t>((magnitude >= 0x477ff000 ? special : finite) | ((bits >> 16) & 0x8000));
}

inline float compute_float8_e4m3(std::uint8_t bits) {
  const int exponent = (bits >> 3) & 0xf;
  const int mantissa = bits & 7;
  const float magnitude = exponent == 0 ? std::ldexp(static_cast<float>(mantissa), -9)
                                        : std::ldexp(static_cast<float>(8 + mantissa), exponent - 10);
  const float value = (bits & 0x7f) == 0x7f ? std::nanf("") : magnitude;
  return (bits & 0x80) != 0 ? -value : value;
}

/// The value of each of the 256 codes of e4m3.
inline const std::array<float, 256> float8_e4m3_values = [] {
  std::array<float, 256> values{};
  for (int i = 0; i < 256; ++i) values[i] = compute_float8_e4m3(static_cast<std::uint8_t>(i));
  return values;
}();

inline float widen_float8_e4m3(std::uint8_t bits) { return float8_e4m3_values[bits]; }

inline std::uint8_t narrow_float8_e4m3(float value) {
  const std::uint32_t bits = std::bit_cast<std::uint32_t>(value);
  const std::uint32_t magnitude = bits & 0x7fffffff;
  const std::uint32_t largest = 0x43e00000;  // 448
  const std::uint32_t limited = magnitude < largest ? magnitude : largest;
  // Subnormal results, below 2**-6: adding 2**14 leaves multiples of 2**-9 in a float32's mantissa.
  const std::uint32_t subnormal = std::bit_cast<std::uint32_t>(std::bit_cast<float>(limited) + 0x1p14F) - 0x46800000;
  const std::uint32_t normal = (limited + 0x7ffff + ((limited >> 20) & 1) - (120U << 23)) >> 20;
  const std::uint32_t finite = limited < 0x3c800000 ? subnormal : normal;
  return static_cast<std::uint8_t>((magnitude > 0x7f800000 ? 0x7f : finite) | ((bits >> 24) & 0x80));
}

}  // namespace mate::cpu
