// Functions of vectors.
#pragma once

#include <bit>
#include <numbers>

#include "vectors.h"

namespace mate::cpu {

/// 2**x for x <= 0, within 2 units in the last place; 0 below -126.5, NaN of NaN. Of a hidden key's score x may be
/// larger, and the result anything.
template <typename Isa>
typename Isa::Floats exp2(typename Isa::Floats x) {
  using Floats = typename Isa::Floats;
  using Unsigned = typename Isa::Unsigned;
  // The least power is 2**-127, whose exponent bits are those of 0.
  x = Isa::max(Isa::broadcast(-127.0F), x);
  // Adding 1.5 * 2**23 rounds x to an integer, which is then in the low bits.
  const Floats shifted = x + 0x1.8p23F;
  const Floats fraction = x - (shifted - 0x1.8p23F);
  const auto power = std::bit_cast<Floats>((std::bit_cast<Unsigned>(shifted) << 23) + 0x3f800000U);
  // Chebyshev fit of 2**fraction on -0.5 .. 0.5.
  Floats y = Isa::broadcast(1.5337577e-4F);
  y = Isa::multiply_add(y, fraction, Isa::broadcast(1.339986e-3F));
  y = Isa::multiply_add(y, fraction, Isa::broadcast(9.6185198e-3F));
  y = Isa::multiply_add(y, fraction, Isa::broadcast(5.550329e-2F));
  y = Isa::multiply_add(y, fraction, Isa::broadcast(2.4022646e-1F));
  y = Isa::multiply_add(y, fraction, Isa::broadcast(6.9314718e-1F));
  y = Isa::multiply_add(y, fraction, Isa::broadcast(1.0F));
  return y * power;
}

/// tanh(x), within a few units in the last place.
template <typename Isa>
typename Isa::Floats tanh(typename Isa::Floats x) {
  using Floats = typename Isa::Floats;
  using Ints = typename Isa::Ints;
  const auto sign = std::bit_cast<Ints>(x) & std::bit_cast<Ints>(Isa::broadcast(-0.0F));
  const auto magnitude = std::bit_cast<Floats>(std::bit_cast<Ints>(x) ^ sign);
  // Near 0 a Chebyshev fit of (tanh(x) / x - 1) / x**2 over x**2: 1 - power would lose all but a few bits.
  const Floats square = x * x;
  Floats y = Isa::broadcast(2.29585e-3F);
  y = Isa::multiply_add(y, square, Isa::broadcast(-8.34699e-3F));
  y = Isa::multiply_add(y, square, Isa::broadcast(2.176997e-2F));
  y = Isa::multiply_add(y, square, Isa::broadcast(-5.395941e-2F));
  y = Isa::multiply_add(y, square, Isa::broadcast(1.3333304e-1F));
  y = Isa::multiply_add(y, square, Isa::broadcast(-3.3333334e-1F));
  const Floats near = Isa::multiply_add(y * square, magnitude, magnitude);
  const Floats power = exp2<Isa>(magnitude * (-2 * std::numbers::log2e_v<float>));
  const Floats far = (1.0F - power) / (1.0F + power);
  const Floats result = magnitude < 0.625F ? near : far;
  return std::bit_cast<Floats>(std::bit_cast<Ints>(result) | sign);
}

}  // namespace mate::cpu
