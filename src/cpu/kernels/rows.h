// Rows of numbers: conversions, and packing for the products.
#pragma once

#include <algorithm>
#include <type_traits>

#include "cpu/kernels.h"
#include "vectors.h"

namespace mate::cpu {

template <typename Isa>
void widen_row(ElementType type, const void* source, float factor, float* target, int count) {
  visit_type(type, [&](auto number) {
    const auto* numbers = static_cast<const decltype(number)*>(source);
    int i = 0;
    for (; i + Isa::lanes <= count; i += Isa::lanes) Isa::store(target + i, factor * Isa::load(numbers + i));
    for (; i < count; ++i) target[i] = factor * widen(numbers[i]);
  });
}

template <typename Isa>
void narrow_row(const float* source, ElementType type, void* target, int count) {
  visit_type(type, [&](auto number) {
    using Number = decltype(number);
    const float* __restrict floats = source;
    Number* __restrict numbers = static_cast<Number*>(target);
    for (int i = 0; i < count; ++i) numbers[i] = narrow<Number>(floats[i]);
  });
}

/// target (width, strip_rows)[:, :count] = rows (count, stride)[:, :width], transposed. Columns up to the next multiple
/// of width_multiple become 0.
template <typename Isa>
void transpose(const float* rows, int stride, int count, int width, float* target) {
  const auto load = [](const float* source) {
    Float4 value;
    std::memcpy(&value, source, sizeof(value));
    return value;
  };
  const auto store = [](float* to, Float4 value) { std::memcpy(to, &value, sizeof(value)); };
  int row = 0;
  for (; row + 4 <= count; row += 4) {
    const float* from = rows + std::int64_t{row} * stride;
    float* to = target + row;
    int i = 0;
    for (; i + 4 <= width; i += 4) {
      const Float4 a = load(from + i);
      const Float4 b = load(from + stride + i);
      const Float4 c = load(from + 2 * stride + i);
      const Float4 d = load(from + 3 * stride + i);
      const Float4 ab_low = __builtin_shufflevector(a, b, 0, 4, 1, 5);
      const Float4 cd_low = __builtin_shufflevector(c, d, 0, 4, 1, 5);
      const Float4 ab_high = __builtin_shufflevector(a, b, 2, 6, 3, 7);
      const Float4 cd_high = __builtin_shufflevector(c, d, 2, 6, 3, 7);
      store(to + i * strip_rows, __builtin_shufflevector(ab_low, cd_low, 0, 1, 4, 5));
      store(to + (i + 1) * strip_rows, __builtin_shufflevector(ab_low, cd_low, 2, 3, 6, 7));
      store(to + (i + 2) * strip_rows, __builtin_shufflevector(ab_high, cd_high, 0, 1, 4, 5));
      store(to + (i + 3) * strip_rows, __builtin_shufflevector(ab_high, cd_high, 2, 3, 6, 7));
    }
    for (; i < width; ++i) {
      for (int lane = 0; lane < 4; ++lane) to[i * strip_rows + lane] = from[lane * stride + i];
    }
  }
  const int padded = (count + width_multiple - 1) / width_multiple * width_multiple;
  for (int i = 0; i < width; ++i) {
    for (int column = row; column < padded; ++column) {
      target[i * strip_rows + column] = column < count ? rows[std::int64_t{column} * stride + i] : 0.0F;
    }
  }
}

/// How operands of float32 are packed.
template <typename Isa>
struct Float32Operands {
  static constexpr int numbers_per_lane = 1;

  static typename Isa::Floats multiply_add(typename Isa::Floats a, typename Isa::Floats b, typename Isa::Floats c) {
    return Isa::multiply_add(a, b, c);
  }

  static void pack_queries(const float* rows, int stride, int count, int depth, float* target) {
    transpose<Isa>(rows, stride, count, depth, target);
  }

  static void pack_keys(ElementType type, BlockRows rows, KeyRange columns, int depth, float* target, int stride) {
    for (int key = columns.begin; key < columns.end; ++key) {
      widen_row<Isa>(type, rows[key], 1, target + std::int64_t{key} * stride, depth);
    }
  }

  static void pack_values(ElementType type, BlockRows rows, KeyRange columns, int width, float* target, int stride) {
    pack_keys(type, rows, columns, width, target, stride);
  }
};

/// How operands of bfloat16 are packed: two to a lane, the first in the low half.
template <typename Isa>
struct BFloat16Operands {
  static constexpr int numbers_per_lane = 2;

  static typename Isa::Floats multiply_add(typename Isa::Floats a, typename Isa::Floats b, typename Isa::Floats c) {
    return Isa::multiply_add_pairs(a, b, c);
  }

  static void pack_queries(const float* rows, int stride, int count, int depth, float* target) {
    constexpr int most_lanes = max_head_dim / 2;
    float pairs[strip_rows * most_lanes];
    const int lanes = (depth + 1) / 2;
    for (int row = 0; row < count; ++row) {
      float* to = pairs + row * lanes;
      to[lanes - 1] = 0;
      narrow_row<Isa>(rows + std::int64_t{row} * stride, ElementType::bfloat16, to, depth);
    }
    transpose<Isa>(pairs, lanes, count, lanes, target);
  }

  static void pack_keys(ElementType, BlockRows rows, KeyRange columns, int depth, float* target, int stride) {
    for (int key = columns.begin; key < columns.end; ++key) {
      float* to = target + std::int64_t{key} * stride;
      to[(depth - 1) / 2] = 0;
      std::memcpy(to, rows[key], std::size_t(depth) * sizeof(BFloat16));
    }
  }

  static void pack_values(ElementType, BlockRows rows, KeyRange columns, int width, float* target, int stride) {
    for (int key = columns.begin; key < columns.end; key += 2) {
      const char* __restrict first = rows[key];
      const char* __restrict second = rows[key + 1];
      char* __restrict to = reinterpret_cast<char*>(target + std::int64_t{key / 2} * stride);
      for (int i = 0; i < width; ++i) {
        std::uint16_t low;
        std::uint16_t high;
        std::memcpy(&low, first + 2 * i, 2);
        std::memcpy(&high, second + 2 * i, 2);
        const std::uint32_t pair = low | std::uint32_t{high} << 16;
        std::memcpy(to + 4 * i, &pair, 4);
      }
    }
  }
};

}  // namespace mate::cpu
