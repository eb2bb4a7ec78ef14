// Rotary embedding of one row.
#pragma once

#include <cstdint>

#include "attention/problem.h"
#include "kernels.h"

namespace mate::cpu {

/// Rotates the first rotary.dim of `row` to `position`, which is limited to the table. `scratch` holds rotary.dim
/// floats.
inline void rotate(const Rotary& rotary, std::int64_t position, const Kernels& kernels, float* row, float* scratch) {
  const std::int64_t table_row = clamp(position, 0, rotary.rows - 1);
  const int half = rotary.dim / 2;
  float* cos = scratch;
  float* sin = scratch + half;
  kernels.widen(rotary.type, rotary.cos_row(table_row), 1, cos, half);
  kernels.widen(rotary.type, rotary.sin_row(table_row), 1, sin, half);
  const int pair_step = rotary.interleaved ? 2 : 1;
  const int partner = rotary.interleaved ? 1 : half;
  for (int i = 0; i < half; ++i) {
    float& a = row[i * pair_step];
    float& b = row[i * pair_step + partner];
    const float rotated = a * cos[i] - b * sin[i];
    b = a * sin[i] + b * cos[i];
    a = rotated;
  }
}

}  // namespace mate::cpu
