// The online softmax: each query row is a lane, its scores a column.
#pragma once

#include <limits>
#include <type_traits>

#include "cpu/kernels.h"
#include "math.h"
#include "vectors.h"

namespace mate::cpu {

template <typename Isa>
void cap_scores(float* scores, KeyRange columns, float scale, float softcap, int rows) {
  for (int key = columns.begin; key < columns.end; ++key) {
    for (int row = 0; row < rows; row += Isa::lanes) {
      float* score = scores + key * strip_rows + row;
      Isa::store(score, softcap * tanh<Isa>(scale * Isa::load(score) / softcap));
    }
  }
}

/// The part of a mask that is a vector of rows.
template <typename Isa, bool Masked>
struct VisibleRows {
  typename Isa::Unsigned begin;
  typename Isa::Unsigned count;

  VisibleRows(const VisibleKeys& visible, int row) {
    if constexpr (Masked) {
      begin = std::bit_cast<typename Isa::Unsigned>(Isa::load(visible.begin + row) - visible.first_key);
      count = std::bit_cast<typename Isa::Unsigned>(Isa::load(visible.count + row));
    }
  }

  /// `value` in the rows that see `key`, `hidden` in the others.
  typename Isa::Floats select(int key, typename Isa::Floats value, typename Isa::Floats hidden) const {
    if constexpr (!Masked) return value;
    // As unsigned numbers, positions before the first key are larger than any count.
    return (static_cast<std::uint32_t>(key) - begin) < count ? value : hidden;
  }
};

template <typename Isa, typename Operands, bool Masked>
void update_softmax(float* scores, KeyRange columns, const VisibleKeys& visible, float scale, int rows,
                    RunningSoftmax softmax, float* rescale) {
  using Floats = typename Isa::Floats;
  const Floats lowest = Isa::broadcast(-std::numeric_limits<float>::infinity());
  const Floats zero = {};
  for (int row = 0; row < rows; row += Isa::lanes) {
    const VisibleRows<Isa, Masked> sees(visible, row);
    float* column = scores + row;
    const auto score = [&](int key) { return Isa::load(column + key * strip_rows); };

    Floats maxima[2] = {lowest, lowest};
    for (int key = columns.begin; key < columns.end; key += 2) {
      for (int i = 0; i < 2; ++i) maxima[i] = Isa::max(sees.select(key + i, score(key + i), lowest), maxima[i]);
    }
    const Floats old_max = Isa::load(softmax.max + row);
    // Rounding keeps the order of scores, so the largest is scaled alone.
    const Floats max = Isa::max(scale * Isa::max(maxima[0], maxima[1]), old_max);
    // With nothing but -inf so far any finite number will do: every weight is 0, or NaN where the score is.
    const Floats base = max == lowest ? zero : max;

    // Sums over even and odd keys of the block, so that the order does not depend on what the row sees.
    Floats sums[2] = {};
    for (int key = columns.begin; key < columns.end; key += 2) {
      Floats weights[2];
      for (int i = 0; i < 2; ++i) {
        weights[i] = sees.select(key + i, exp2<Isa>(scale * score(key + i) - base), zero);
        sums[i] += weights[i];
      }
      if constexpr (Operands::numbers_per_lane == 2) {
        Isa::store(column + key / 2 * strip_rows, Isa::pair(weights[0], weights[1]));
      } else {
        for (int i = 0; i < 2; ++i) Isa::store(column + (key + i) * strip_rows, weights[i]);
      }
    }
    const Floats factor = exp2<Isa>(old_max - base);
    Isa::store(rescale + row, factor);
    Isa::store(softmax.max + row, max);
    Isa::store(softmax.sum + row, Isa::multiply_add(Isa::load(softmax.sum + row), factor, sums[0] + sums[1]));
  }
}

template <typename Isa, typename Operands>
void update_softmax(float* scores, KeyRange columns, const VisibleKeys& visible, float scale, int rows,
                    RunningSoftmax softmax, float* rescale) {
  if (visible.begin == nullptr) {
    update_softmax<Isa, Operands, false>(scores, columns, visible, scale, rows, softmax, rescale);
  } else {
    update_softmax<Isa, Operands, true>(scores, columns, visible, scale, rows, softmax, rescale);
  }
}

}  // namespace mate::cpu
