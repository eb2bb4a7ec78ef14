// Merges the partial results of one row: the splits of its keys, its sink, or partial results of the caller's.
#pragma once

#include <cmath>
#include <limits>
#include <numbers>
#include <optional>
#include <span>

namespace mate::cpu {

/// sums[i] = sum_j 2**(score_j - max) * v[j][i] over some keys, and sum likewise without v. A part whose sums are null
/// is left out.
struct PartialRow {
  const float* sums;
  double max;
  double sum;
};

/// Writes the attention over all parts to out (width) and returns its lse, natural log. Parts are added in order.
inline float merge_row(std::span<const PartialRow> parts, std::optional<double> sink, int width, float* out) {
  constexpr double infinity = std::numeric_limits<double>::infinity();
  double max = -infinity;
  double sum = 0;
  for (const PartialRow& part : parts) {
    if (part.sums != nullptr && part.max > max) max = part.max;
  }
  // Where every score is -inf the sums are 0, or NaN of a score that is; any finite maximum then leaves them so.
  const double base = max == -infinity ? 0 : max;
  for (const PartialRow& part : parts) {
    if (part.sums != nullptr) sum += part.sum * std::exp2(part.max - base);
  }
  for (int i = 0; i < width; ++i) out[i] = 0;
  if (sum == 0) return static_cast<float>(sink.value_or(-infinity));

  double lse = base * std::numbers::ln2 + std::log(sum);
  double share = 1 / sum;
  if (sink == infinity && lse < infinity) return static_cast<float>(infinity);
  if (sink) {
    const double keys_lse = lse;
    const double larger = std::fmax(keys_lse, *sink);
    lse = larger + std::log(std::exp(keys_lse - larger) + std::exp(*sink - larger));
    share *= std::exp(keys_lse - lse);
  }
  for (const PartialRow& part : parts) {
    if (part.sums == nullptr) continue;
    const auto factor = static_cast<float>(std::exp2(part.max - base) * share);
    for (int i = 0; i < width; ++i) out[i] += factor * part.sums[i];
  }
  return static_cast<float>(lse);
}

}  // namespace mate::cpu
