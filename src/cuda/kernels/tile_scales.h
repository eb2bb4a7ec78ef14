// Scales of tensors that were rounded to e4m3.
#pragma once

#include "forward_variant.h"
#include "tile_work.h"

namespace mate::cuda {

/// What becomes of the scores and sums of a tile whose tensors were scaled when they were rounded to e4m3.
struct TileScales {
  float score_factor = 1;    ///< multiplies products before they are capped and compared
  float exponent_scale = 1;  ///< multiplies scores to make them exponents of 2
  float qk_factor = 1;       ///< multiplies the products of q and k before those of qv and v are added
  float value_factor = 1;    ///< multiplies sums of values
};

/// What to multiply q . k by before qv . v is added, so that the sum times `factor` is key * q . k + value * qv . v.
/// Neither scale needs to differ from 0.
__device__ inline float relative_scale(float key, float value, float& factor) {
  // Beyond this ratio the smaller term is lost in the other's rounding, whatever it is.
  constexpr float most = 0x1p40F;
  factor = value;
  if (key == value) return 1;
  if (fabsf(key) < most * fabsf(value)) return key / value;
  factor = key / most;
  return most;
}

/// Of a tile that is found. One lane asks for them.
template <ForwardVariant variant>
__device__ inline TileScales scales_of(const ForwardArguments& a, const TileWork& work) {
  const Problem& p = a.problem;
  const float key = p.k_descale.at(work.sequence, work.head_k);
  TileScales scales;
  scales.value_factor = p.v_descale.at(work.sequence, work.head_k);
  float factor = key;
  if constexpr (variant.qv) scales.qk_factor = relative_scale(key, scales.value_factor, factor);
  if constexpr (variant.types.query == ElementType::float8_e4m3) factor *= p.q_descale.at(work.sequence, work.head_k);
  scales.score_factor = a.score_factor * factor;
  scales.exponent_scale = a.exponent_scale;
  if constexpr (variant.scores == Scores::products) {
    // The largest score is that of the largest product where the factor is positive, and hidden keys stay hidden where
    // it is not 0.
    constexpr float smallest = 0x1p-126F;
    constexpr float largest = 0x1.fffffep127F;
    const float all = a.exponent_scale * factor;
    if (all >= smallest && all <= largest) {
      scales.score_factor = 1;
      scales.exponent_scale = all;
    }
  }
  return scales;
}

}  // namespace mate::cuda
