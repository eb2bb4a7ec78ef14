#pragma once

#include <vector>

#include "cpp/memory.h"

namespace mate::cuda::ptx {

// The number formats are those of the tests.
inline unsigned bits_of(DLDataType type, float x) { return testing::encode(testing::format_of(type), x); }

/// All numbers of a type, by their bits.
inline std::vector<float> numbers_of(DLDataType type) {
  std::vector<float> numbers(std::size_t{1} << type.bits);
  for (unsigned bits = 0; bits < numbers.size(); ++bits) {
    numbers[bits] = static_cast<float>(testing::decode(testing::format_of(type), bits));
  }
  return numbers;
}
inline float number_of(DLDataType type, unsigned bits) {
  static const std::vector<float> bfloat16s = numbers_of(bfloat16);
  static const std::vector<float> float16s = numbers_of(float16);
  static const std::vector<float> e4m3s = numbers_of(float8_e4m3fn);
  return (type == bfloat16 ? bfloat16s : type == float16 ? float16s : e4m3s)[bits];
}

inline unsigned pack_bfloat16(float first, float second) {
  return bits_of(bfloat16, first) | bits_of(bfloat16, second) << 16;
}
inline unsigned pack_float16(float first, float second) {
  return bits_of(float16, first) | bits_of(float16, second) << 16;
}
inline unsigned char round_to_e4m3(float value) { return static_cast<unsigned char>(bits_of(float8_e4m3fn, value)); }
inline unsigned pack_e4m3(float first, float second, float third, float fourth) {
  return round_to_e4m3(first) | round_to_e4m3(second) << 8 | round_to_e4m3(third) << 16 |
         static_cast<unsigned>(round_to_e4m3(fourth)) << 24;
}
inline unsigned widen_e4m3(unsigned short pair) {
  return pack_float16(number_of(float8_e4m3fn, pair & 0xff), number_of(float8_e4m3fn, pair >> 8));
}
inline uint2 widen_e4m3_of_word(unsigned word) {
  return make_uint2(widen_e4m3(static_cast<unsigned short>(word)), widen_e4m3(static_cast<unsigned short>(word >> 16)));
}
inline float2 widen_halves(unsigned halves) {
  return {number_of(float16, halves & 0xffff), number_of(float16, halves >> 16)};
}

/// Element i of those that a word holds.
template <ElementType element>
float element_of(unsigned word, int i) {
  if constexpr (element == ElementType::float8_e4m3) return number_of(float8_e4m3fn, word >> 8 * i & 0xff);
  const unsigned bits = word >> 16 * i & 0xffff;
  return element == ElementType::bfloat16 ? number_of(bfloat16, bits) : number_of(float16, bits);
}

}  // namespace mate::cuda::ptx
