#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

#include "conversions.h"
#include "kernels.h"

namespace mate::cpu {
namespace {

constexpr float negative_infinity = -std::numeric_limits<float>::infinity();

template <typename Storage, typename Convert>
void widen_all(const void* source, float factor, float* target, int count, Convert convert) {
  const auto* __restrict values = static_cast<const Storage*>(source);
  float* __restrict results = target;
  for (int i = 0; i < count; ++i) results[i] = factor * convert(values[i]);
}

void widen(ElementType type, const void* source, float factor, float* target, int count) {
  switch (type) {
    case ElementType::float32:
      if (factor == 1) {
        std::memcpy(target, source, std::size_t(count) * sizeof(float));
        return;
      }
      return widen_all<float>(source, factor, target, count, [](float x) { return x; });
    case ElementType::float16:
      return widen_all<std::uint16_t>(source, factor, target, count, widen_float16);
    case ElementType::bfloat16:
      return widen_all<std::uint16_t>(source, factor, target, count, widen_bfloat16);
    case ElementType::float8_e4m3:
      return widen_all<std::uint8_t>(source, factor, target, count, widen_float8_e4m3);
  }
}

template <typename Storage, typename Convert>
void narrow_all(const float* source, void* target, int count, Convert convert) {
  auto* __restrict values = static_cast<Storage*>(target);
  const float* __restrict numbers = source;
  for (int i = 0; i < count; ++i) values[i] = convert(numbers[i]);
}

void narrow(const float* source, ElementType type, void* target, int count) {
  switch (type) {
    case ElementType::float32:
      return narrow_all<float>(source, target, count, [](float x) { return x; });
    case ElementType::float16:
      return narrow_all<std::uint16_t>(source, target, count, narrow_float16);
    case ElementType::bfloat16:
      return narrow_all<std::uint16_t>(source, target, count, narrow_bfloat16);
    case ElementType::float8_e4m3:
      return narrow_all<std::uint8_t>(source, target, count, narrow_float8_e4m3);
  }
}

// Four floats that compilers keep in one register of the baseline instruction set, whatever it is.
using Float4 = float __attribute__((vector_size(16)));
constexpr int lanes = 4;

Float4 load(const float* source) {
  Float4 value;
  std::memcpy(&value, source, sizeof(value));
  return value;
}

void store(float* target, Float4 value) { std::memcpy(target, &value, sizeof(value)); }

void transpose(const float* rows, int row_stride, KeyRange columns, int width, float* target) {
  for (int column = columns.begin / lanes * lanes; column < columns.end; column += lanes) {
    const float* first = rows + std::int64_t{column} * row_stride;
    float* to = target + column;
    int i = 0;
    for (; i + lanes <= width; i += lanes) {
      const Float4 a = load(first + i);
      const Float4 b = load(first + row_stride + i);
      const Float4 c = load(first + 2 * row_stride + i);
      const Float4 d = load(first + 3 * row_stride + i);
      const Float4 ab_low = __builtin_shufflevector(a, b, 0, 4, 1, 5);
      const Float4 cd_low = __builtin_shufflevector(c, d, 0, 4, 1, 5);
      const Float4 ab_high = __builtin_shufflevector(a, b, 2, 6, 3, 7);
      const Float4 cd_high = __builtin_shufflevector(c, d, 2, 6, 3, 7);
      store(to + std::int64_t{i} * block_keys, __builtin_shufflevector(ab_low, cd_low, 0, 1, 4, 5));
      store(to + std::int64_t{i + 1} * block_keys, __builtin_shufflevector(ab_low, cd_low, 2, 3, 6, 7));
      store(to + std::int64_t{i + 2} * block_keys, __builtin_shufflevector(ab_high, cd_high, 0, 1, 4, 5));
      store(to + std::int64_t{i + 3} * block_keys, __builtin_shufflevector(ab_high, cd_high, 2, 3, 6, 7));
    }
    for (; i < width; ++i) {
      for (int lane = 0; lane < lanes; ++lane) to[std::int64_t{i} * block_keys + lane] = first[lane * row_stride + i];
    }
  }
}

// The part of a product that stays in registers while its depth is run through.
constexpr int register_rows = 4;
constexpr int register_columns = 2 * lanes;
// A row alone takes more columns, since each sum has to wait for its last addition.
constexpr int columns_of_rows(int rows) { return rows == 1 ? 2 * register_columns : register_columns; }
static_assert(block_keys % columns_of_rows(1) == 0 && width_multiple % columns_of_rows(1) == 0);

// result[r][c] = factors[r] * result[r][c] + sum over i < depth of left[r][i] * right[i][c], in the order of i, for
// Rows rows and columns_of_rows(Rows) columns. Without factors the result is the sum alone.
template <int Rows>
void multiply_add(const float* left, std::int64_t left_stride, const float* right, std::int64_t right_stride, int depth,
                  const float* factors, float* result, std::int64_t result_stride) {
  constexpr int vectors = columns_of_rows(Rows) / lanes;
  Float4 sums[Rows][vectors] = {};
  for (int i = 0; i < depth; ++i) {
    Float4 values[vectors];
    for (int c = 0; c < vectors; ++c) values[c] = load(right + i * right_stride + c * lanes);
    for (int r = 0; r < Rows; ++r) {
      const float factor = left[r * left_stride + i];
      for (int c = 0; c < vectors; ++c) sums[r][c] += factor * values[c];
    }
  }
  for (int r = 0; r < Rows; ++r) {
    for (int c = 0; c < vectors; ++c) {
      float* target = result + r * result_stride + c * lanes;
      store(target, factors == nullptr ? sums[r][c] : factors[r] * load(target) + sums[r][c]);
    }
  }
}

// Calls multiply(row, count) for groups of register_rows rows, then for single ones. `count` is a compile-time
// constant.
template <typename Multiply>
void for_row_groups(int rows, const Multiply& multiply) {
  int row = 0;
  for (; row + register_rows <= rows; row += register_rows) {
    multiply(row, std::integral_constant<int, register_rows>());
  }
  for (; row < rows; ++row) multiply(row, std::integral_constant<int, 1>());
}

void multiply_scores(const float* queries, const float* keys, KeyRange columns, float* scores, int rows, int depth) {
  // A wide head is summed in parts: the rounding of one long chain of additions would show.
  constexpr int part = 64;
  constexpr float ones[register_rows] = {1, 1, 1, 1};
  for_row_groups(rows, [&](int row, auto count) {
    constexpr int step = columns_of_rows(count());
    for (int column = columns.begin / step * step; column < columns.end; column += step) {
      for (int i = 0; i < depth; i += part) {
        multiply_add<count()>(queries + std::int64_t{row} * depth + i, depth, keys + i * block_keys + column,
                              block_keys, std::min(part, depth - i), i == 0 ? nullptr : ones,
                              scores + row * block_keys + column, block_keys);
      }
    }
  });
}

void dot_scores(const float* query, const float* keys, int row_stride, KeyRange columns, int depth, bool add,
                float* scores) {
  constexpr int vectors = 4;
  for (int column = columns.begin; column < columns.end; ++column) {
    const float* key = keys + std::int64_t{column} * row_stride;
    Float4 sums[vectors] = {};
    int i = 0;
    for (; i + vectors * lanes <= depth; i += vectors * lanes) {
      for (int c = 0; c < vectors; ++c) sums[c] += load(query + i + c * lanes) * load(key + i + c * lanes);
    }
    float rest = 0;
    for (; i < depth; ++i) rest += query[i] * key[i];
    const Float4 sum = (sums[0] + sums[1]) + (sums[2] + sums[3]);
    const float product = ((sum[0] + sum[1]) + (sum[2] + sum[3])) + rest;
    scores[column] = add ? scores[column] + product : product;
  }
}

void accumulate(const float* weights, KeyRange columns, const float* values, const float* rescale, float* sums,
                int rows, int width) {
  for_row_groups(rows, [&](int row, auto count) {
    for (int column = 0; column < width; column += columns_of_rows(count())) {
      multiply_add<count()>(weights + row * block_keys + columns.begin, block_keys,
                            values + std::int64_t{columns.begin} * width + column, width, columns.size(), rescale + row,
                            sums + std::int64_t{row} * width + column, width);
    }
  });
}

void cap_scores(float* scores, float scale, float softcap, int count) {
  for (int i = 0; i < count; ++i) scores[i] = softcap * std::tanh(scale * scores[i] / softcap);
}

// 2**x for x <= 0, within 2 units in the last place; 0 below -126, NaN of NaN.
float exp2(float x) {
  // Adding 1.5 * 2**23 rounds x to an integer, which is then in the low bits.
  const float shifted = x + 0x1.8p23F;
  const float fraction = x - (shifted - 0x1.8p23F);
  const float scale = std::bit_cast<float>((std::bit_cast<std::uint32_t>(shifted) << 23) + 0x3f800000U);
  // Chebyshev fit of 2**fraction on -0.5 .. 0.5.
  float y = 1.5337577e-4F;
  y = y * fraction + 1.339986e-3F;
  y = y * fraction + 9.6185198e-3F;
  y = y * fraction + 5.550329e-2F;
  y = y * fraction + 2.4022646e-1F;
  y = y * fraction + 6.9314718e-1F;
  y = y * fraction + 1.0F;
  return x < -126.0F ? 0.0F : y * scale;
}

float update_softmax(float* scores, KeyRange visible, float scale, RunningSoftmax& row) {
  for (int i = 0; i < visible.begin; ++i) scores[i] = 0;
  for (int i = visible.end; i < block_keys; ++i) scores[i] = 0;
  if (visible.empty()) return 1;

  float max = row.max;
  for (int i = visible.begin; i < visible.end; ++i) {
    scores[i] *= scale;
    max = scores[i] > max ? scores[i] : max;
  }
  // With nothing but -inf so far any finite number will do: every weight is 0, or NaN where the score is.
  const float base = max == negative_infinity ? 0 : max;
  for (int i = visible.begin; i < visible.end; ++i) scores[i] = exp2(scores[i] - base);

  // Summed in lanes at fixed places of the block, so that the order does not depend on what the row sees.
  Float4 lane_sums{};
  for (int i = 0; i < block_keys; i += lanes) lane_sums += load(scores + i);
  const float sum = (lane_sums[0] + lane_sums[1]) + (lane_sums[2] + lane_sums[3]);

  const float rescale = row.max == negative_infinity ? 0.0F : exp2(row.max - base);
  row.sum = row.sum * rescale + sum;
  row.max = max;
  return rescale;
}

}  // namespace

const Kernels portable_kernels{
    "portable", widen, narrow, transpose, multiply_scores, dot_scores, cap_scores, update_softmax, accumulate,
};

}  // namespace mate::cpu
