// The judge of masks: the contract's table of rules, one line each, shared with no part of the library.
#pragma once

#include <cstdint>

namespace mate::testing {

/// The mask arguments of a call, as a user gives them.
struct MaskArguments {
  bool causal = false;
  std::int64_t left = -1;
  std::int64_t right = -1;
  std::int64_t chunk = 0;
  std::int64_t cp_world = 1;
  std::int64_t cp_rank = 0;
};

constexpr std::int64_t floor_quotient(std::int64_t a, std::int64_t b) {
  std::int64_t quotient = a / b;
  while (quotient * b > a) --quotient;
  return quotient;
}

/// Whether query row i of sq sees key j of the sk that this rank holds; all ranks together hold `total`.
constexpr bool visible(const MaskArguments& mask, std::int64_t i, std::int64_t j, std::int64_t sq, std::int64_t sk,
                       std::int64_t total) {
  if (j < 0 || j >= sk) return false;
  if (mask.cp_world > 1) {
    j = j * mask.cp_world + mask.cp_rank;
    sk = total;
    if (j >= total) return false;
  }
  const std::int64_t p = i + sk - sq;
  if (mask.causal && j > p) return false;
  if (mask.left >= 0 && j < p - mask.left) return false;
  const std::int64_t right = mask.causal ? 0 : mask.right;
  if (right >= 0 && j > p + right) return false;
  if (mask.chunk > 0 && floor_quotient(p, mask.chunk) != floor_quotient(j, mask.chunk)) return false;
  return true;
}

}  // namespace mate::testing
