// Merges the partial results of one row: the splits of its keys, its sink, or partial results of the caller's.
#pragma once

#include <cmath>
#include <limits>
#include <numbers>
#include <optional>
#include <span>

namespace mate::cpu {

/// sums[i] = sum_j 2**(score_j - max) * v[j][i] over some keys, and sum likewise without v.
struct PartialRow {
  const float* sums;
  double max;
  double sum;

  /// A row with a NaN among its scores has a NaN for its sum, whatever its maximum.
  bool saw_nothing() const { return max == -std::numeric_limits<double>::infinity() && !std::isnan(sum); }
};

/// Writes the attention over all parts to out (width) and returns its lse, natural log. Parts are added in order. A
/// part that saw nothing is not read.
inline float merge_row(std::span<const PartialRow> parts, std::optional<double> sink, int width, float* out) {
  constexpr double infinity = std::numeric_limits<double>::infinity();
  double max = -infinity;
  bool nothing = true;
  for (const PartialRow& part : parts) {
    if (part.saw_nothing()) continue;
    nothing = false;
    if (part.max > max) max = part.max;
  }
  for (int i = 0; i < width; ++i) out[i] = 0;
  if (nothing) return static_cast<float>(sink.value_or(-infinity));

  double sum = 0;
  for (const PartialRow& part : parts) {
    if (part.saw_nothing()) continue;
    sum += part.sum * std::exp2(part.max - max);
  }
  double lse = max * std::numbers::ln2 + std::log(sum);
  double share = 1 / sum;
  if (sink) {
    const double keys_lse = lse;
    const double larger = std::fmax(keys_lse, *sink);
    lse = larger + std::log(std::exp(keys_lse - larger) + std::exp(*sink - larger));
    share *= std::exp(keys_lse - lse);
  }
  for (const PartialRow& part : parts) {
    if (part.saw_nothing()) continue;
    const auto factor = static_cast<float>(std::exp2(part.max - max) * share);
    for (int i = 0; i < width; ++i) out[i] += factor * part.sums[i];
  }
  return static_cast<float>(lse);
}

}  // namespace mate::cpu
