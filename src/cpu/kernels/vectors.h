// The operations on vectors of floats that the kernels are written in, with the vector types of GCC and Clang. They
// translate to any processor; an instruction set derives from Vectors and replaces those that it has better ones for.
#pragma once

#include <cstdint>
#include <cstring>

#include "cpu/conversions.h"

namespace mate::cpu {

template <typename Number, int Lanes>
struct VectorOf {
  typedef Number Type __attribute__((vector_size(sizeof(Number) * Lanes)));
};

/// What every processor has.
using Float4 = VectorOf<float, 4>::Type;

/// `Self` is the instruction set: a type of its own for each file, so that no two files share a function.
template <typename Self, int Lanes>
struct Vectors {
  static constexpr int lanes = Lanes;
  using Floats = typename VectorOf<float, Lanes>::Type;
  using Ints = typename VectorOf<std::int32_t, Lanes>::Type;
  using Unsigned = typename VectorOf<std::uint32_t, Lanes>::Type;

  // Register tiles of products, in rows of the left operand and vectors of the right one, that leave registers for the
  // operands.
  static constexpr int score_keys = 4;     ///< of multiply_scores: keys,
  static constexpr int score_vectors = 2;  ///< and vectors of query rows
  static constexpr int sum_rows = 4;       ///< of accumulate: query rows,
  static constexpr int sum_vectors = 2;    ///< and vectors of values
  static constexpr int dot_rows = 2;       ///< of dot_scores: query rows, by four keys

  static Floats broadcast(float value) { return value - Floats{}; }
  static Ints broadcast(std::int32_t value) { return value - Ints{}; }

  static Floats load(const float* source) {
    Floats result;
    std::memcpy(&result, source, sizeof(result));
    return result;
  }

  static Ints load(const std::int32_t* source) {
    Ints result;
    std::memcpy(&result, source, sizeof(result));
    return result;
  }

  /// Widens narrower numbers.
  template <typename T>
  static Floats load(const T* source) {
    Floats result;
    for (int lane = 0; lane < Lanes; ++lane) result[lane] = widen(source[lane]);
    return result;
  }

  /// Reads no more than `count` numbers; the other lanes are 0.
  template <typename T>
  static Floats load_first(const T* source, int count) {
    T numbers[Lanes] = {};
    for (int i = 0; i < count; ++i) numbers[i] = source[i];
    return Self::load(numbers);
  }

  static void store(float* target, Floats value) { std::memcpy(target, &value, sizeof(value)); }

  /// a * b + c.
  static Floats multiply_add(Floats a, Floats b, Floats c) { return a * b + c; }

  /// The larger; b where either is NaN.
  static Floats max(Floats a, Floats b) { return a > b ? a : b; }

  /// In each group of four lanes, lane i of the result sums those of the i-th vector.
  static Floats sum_quads(Floats a, Floats b, Floats c, Floats d) {
    static_assert(Lanes == 4);
    const Floats ab = __builtin_shufflevector(a, b, 0, 4, 1, 5) + __builtin_shufflevector(a, b, 2, 6, 3, 7);
    const Floats cd = __builtin_shufflevector(c, d, 0, 4, 1, 5) + __builtin_shufflevector(c, d, 2, 6, 3, 7);
    return __builtin_shufflevector(ab, cd, 0, 1, 4, 5) + __builtin_shufflevector(ab, cd, 2, 3, 6, 7);
  }

  /// Sums the groups of four lanes.
  static Float4 fold(Floats value) {
    static_assert(Lanes == 4);
    return value;
  }
};

}  // namespace mate::cpu
