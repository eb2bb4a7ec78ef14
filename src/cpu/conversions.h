// The number types of tensors, and conversions between float32 and the narrower ones in arithmetic that compilers
// vectorise. All round to nearest even; e4m3 saturates to its largest number, 448, and keeps NaN.
//
// The types may alias others, since tensors are memory of any type.
//
// Always inlined: files compiled for different processors must not share a function that the linker picks from one.
#pragma once

#include <array>
#include <bit>
#include <cstdint>
#include <limits>

#include "attention/problem.h"

namespace mate::cpu {

struct [[gnu::may_alias]] Float16 {
  std::uint16_t bits;
};

struct [[gnu::may_alias]] BFloat16 {
  std::uint16_t bits;
};

struct [[gnu::may_alias]] Float8E4M3 {
  std::uint8_t bits;
};

/// Calls visit(T()) with the number type that `type` names.
template <typename Visit>
[[gnu::always_inline]] inline void visit_type(ElementType type, const Visit& visit) {
  switch (type) {
    case ElementType::float32:
      return visit(float());
    case ElementType::float16:
      return visit(Float16());
    case ElementType::bfloat16:
      return visit(BFloat16());
    case ElementType::float8_e4m3:
      return visit(Float8E4M3());
  }
}

[[gnu::always_inline]] inline float widen(float value) { return value; }

[[gnu::always_inline]] inline float widen(BFloat16 value) {
  return std::bit_cast<float>(std::uint32_t{value.bits} << 16);
}

[[gnu::always_inline]] inline float widen(Float16 value) {
  // The exponent is moved to float32's bias by a multiplication, which turns subnormal numbers into normal ones.
  const std::uint32_t magnitude = (value.bits & 0x7fffU) << 13;
  const float scaled = std::bit_cast<float>(magnitude) * 0x1p112F;
  const std::uint32_t special = magnitude | 0x7f800000;
  const std::uint32_t finite = std::bit_cast<std::uint32_t>(scaled);
  const std::uint32_t result = (value.bits & 0x7c00) == 0x7c00 ? special : finite;
  return std::bit_cast<float>(result | std::uint32_t{value.bits & 0x8000U} << 16);
}

/// The value of each of the 256 codes of e4m3. Computed by the compiler: code that ran at start might be for another
/// processor.
inline constexpr std::array<float, 256> float8_e4m3_values = [] {
  std::array<float, 256> values{};
  for (std::uint32_t code = 0; code < 256; ++code) {
    const std::uint32_t magnitude = code & 0x7f;
    const float normal = std::bit_cast<float>((magnitude << 20) + (120U << 23));
    const float finite = magnitude < 8 ? static_cast<float>(magnitude) * 0x1p-9F : normal;
    const float value = magnitude == 0x7f ? std::numeric_limits<float>::quiet_NaN() : finite;
    values[code] = (code & 0x80) != 0 ? -value : value;
  }
  return values;
}();

[[gnu::always_inline]] inline float widen(Float8E4M3 value) { return float8_e4m3_values[value.bits]; }

/// narrow<T>(value): `value` rounded to T.
template <typename T>
T narrow(float value) = delete;

template <>
[[gnu::always_inline]] inline float narrow<float>(float value) {
  return value;
}

template <>
[[gnu::always_inline]] inline BFloat16 narrow<BFloat16>(float value) {
  const std::uint32_t bits = std::bit_cast<std::uint32_t>(value);
  const std::uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const std::uint32_t quiet_nan = (bits >> 16) | 0x40;
  return {static_cast<std::uint16_t>((bits & 0x7fffffff) > 0x7f800000 ? quiet_nan : rounded)};
}

template <>
[[gnu::always_inline]] inline Float16 narrow<Float16>(float value) {
  const std::uint32_t bits = std::bit_cast<std::uint32_t>(value);
  const std::uint32_t magnitude = bits & 0x7fffffff;
  // Subnormal results: adding 0.5 puts the last bit that float16 keeps, 2**-24, at the end of a float32's mantissa.
  const float shifted = std::bit_cast<float>(magnitude) + 0.5F;
  const std::uint32_t subnormal = std::bit_cast<std::uint32_t>(shifted) - 0x3f000000;
  const std::uint32_t normal = (magnitude + 0xfff + ((magnitude >> 13) & 1) - (112U << 23)) >> 13;
  const std::uint32_t special = magnitude > 0x7f800000 ? 0x7e00 : 0x7c00;
  const std::uint32_t finite = magnitude < 0x38800000 ? subnormal : normal;
  return {static_cast<std::uint16_t>((magnitude >= 0x477ff000 ? special : finite) | ((bits >> 16) & 0x8000))};
}

template <>
[[gnu::always_inline]] inline Float8E4M3 narrow<Float8E4M3>(float value) {
  const std::uint32_t bits = std::bit_cast<std::uint32_t>(value);
  const std::uint32_t magnitude = bits & 0x7fffffff;
  const std::uint32_t largest = 0x43e00000;  // 448
  const std::uint32_t limited = magnitude < largest ? magnitude : largest;
  // Subnormal results, below 2**-6: adding 2**14 leaves multiples of 2**-9 in a float32's mantissa.
  const std::uint32_t subnormal = std::bit_cast<std::uint32_t>(std::bit_cast<float>(limited) + 0x1p14F) - 0x46800000;
  const std::uint32_t normal = (limited + 0x7ffff + ((limited >> 20) & 1) - (120U << 23)) >> 20;
  const std::uint32_t finite = limited < 0x3c800000 ? subnormal : normal;
  return {static_cast<std::uint8_t>((magnitude > 0x7f800000 ? 0x7f : finite) | ((bits >> 24) & 0x80))};
}

}  // namespace mate::cpu
