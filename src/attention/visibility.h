// Which keys a query row sees.
//
// The one definition of causal, windows, chunks and context parallel, for every backend: it includes nothing,
// so that run-time compilers of device code take it as it is.
#pragma once

namespace mate {

/// Rows, keys, heads and pages are counted in an int.
inline constexpr int max_length = 0x7fffffff;

/// The mask of a call. Query row i of a sequence stands at position p = i + total - sq; key j of this rank at
/// position j * cp_world + cp_rank.
struct Mask {
  int left = -1;   ///< keys before p - left are hidden; negative: no bound
  int right = -1;  ///< keys after p + right are hidden (0 is causal); negative: no bound
  int chunk = 0;   ///< keys of another chunk than p's are hidden; 0: no chunks
  int cp_world = 1;
  int cp_rank = 0;

  constexpr bool bounded() const { return left >= 0 || right >= 0 || chunk > 0; }
};

/// The lengths of one sequence.
struct Lengths {
  int sq = 0;     ///< query rows
  int sk = 0;     ///< keys that this rank holds
  int total = 0;  ///< keys of all ranks; sk where there is one rank
};

/// Keys begin <= j < end.
struct KeyRange {
  int begin = 0;
  int end = 0;

  constexpr bool empty() const { return begin >= end; }
  constexpr int size() const { return empty() ? 0 : end - begin; }
};

constexpr int clamp(long long value, long long low, long long high) {
  return static_cast<int>(value < low ? low : value > high ? high : value);
}

/// 32 bits, and not negative: GPUs divide other numbers slowly.
constexpr int divide(int a, int b) { return static_cast<int>(static_cast<unsigned>(a) / static_cast<unsigned>(b)); }

/// a / b, rounded down, for -2**32 <= a < 2**32 and b > 0: GPUs divide 64-bit numbers slowly, in many registers.
constexpr long long floor_divide(long long a, int b) {
  const auto divisor = static_cast<unsigned>(b);
  if (a >= 0) return static_cast<unsigned>(a) / divisor;
  return -1 - static_cast<long long>(static_cast<unsigned>(-1 - a) / divisor);
}

/// The keys that `row`, one of the sequence's, sees: always one range, since every rule bounds the key's position from
/// below or above. Neither end ever decreases with the row.
constexpr KeyRange visible_keys(const Mask& mask, const Lengths& lengths, int row) {
  // A GPU waits for each instruction that it executes for the first time: what few calls need is in one place, which
  // the others jump over, and 32 bits hold all else.
  const int p = lengths.total - lengths.sq + row;
  int begin = 0;
  int end = lengths.total;
  if (mask.left >= 0 && p > mask.left) begin = p - mask.left;
  if (mask.right >= 0 && p < lengths.total - 1 - mask.right) end = p + mask.right + 1;
  if (mask.chunk > 0 || mask.cp_world > 1) {
    long long first = begin;
    long long behind = end;
    if (mask.chunk > 0) {
      const long long chunk_begin = floor_divide(p, mask.chunk) * mask.chunk;
      if (chunk_begin > first) first = chunk_begin;
      if (chunk_begin + mask.chunk < behind) behind = chunk_begin + mask.chunk;
    }
    begin = clamp(floor_divide(first - mask.cp_rank + mask.cp_world - 1, mask.cp_world), 0, lengths.sk);
    end = clamp(floor_divide(behind - mask.cp_rank + mask.cp_world - 1, mask.cp_world), 0, lengths.sk);
  }
  if (begin > lengths.sk) begin = lengths.sk;
  if (end > lengths.sk) end = lengths.sk;
  return {begin, end < 0 ? 0 : end};
}

constexpr int first_visible(const Mask& mask, const Lengths& lengths, int row) {
  return visible_keys(mask, lengths, row).begin;
}
constexpr int end_visible(const Mask& mask, const Lengths& lengths, int row) {
  return visible_keys(mask, lengths, row).end;
}

/// The keys that some row of a range sees, from what its first and its last row see.
constexpr KeyRange keys_of_some_row(KeyRange first, KeyRange last) { return {first.begin, last.end}; }

/// The keys that every row of a range sees: inside it nothing needs masking.
constexpr KeyRange keys_of_every_row(KeyRange first, KeyRange last) { return {last.begin, first.end}; }

/// The keys that some row of first_row .. last_row sees.
constexpr KeyRange keys_of_some_row(const Mask& mask, const Lengths& lengths, int first_row, int last_row) {
  return {first_visible(mask, lengths, first_row), end_visible(mask, lengths, last_row)};
}

/// The keys that every row of first_row .. last_row sees.
constexpr KeyRange keys_of_every_row(const Mask& mask, const Lengths& lengths, int first_row, int last_row) {
  return {first_visible(mask, lengths, last_row), end_visible(mask, lengths, first_row)};
}

}  // namespace mate
