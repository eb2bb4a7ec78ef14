// Which keys a query row sees, against brute force over every small mask and length.
#include "attention/visibility.h"

#include <gtest/gtest.h>

#include <array>
#include <climits>
#include <cstdint>
#include <ostream>
#include <vector>

#include "visible.h"

namespace mate {
namespace {

constexpr int max_length = 9;

/// A set of at most 32 keys, one bit each.
using KeySet = std::uint32_t;

constexpr KeySet set_of(KeyRange range) {
  return range.empty() ? 0 : ((KeySet{1} << range.end) - 1) & ~((KeySet{1} << range.begin) - 1);
}

Mask normalised(const testing::MaskArguments& mask) {
  return {.left = static_cast<int>(mask.left),
          .right = mask.causal ? 0 : static_cast<int>(mask.right),
          .chunk = static_cast<int>(mask.chunk),
          .cp_world = static_cast<int>(mask.cp_world),
          .cp_rank = static_cast<int>(mask.cp_rank)};
}

struct Case {
  testing::MaskArguments mask;
  Lengths lengths;

  friend std::ostream& operator<<(std::ostream& out, const Case& c) {
    return out << "causal=" << c.mask.causal << " window=(" << c.mask.left << ", " << c.mask.right
               << ") chunk=" << c.mask.chunk << " cp=" << c.mask.cp_rank << "/" << c.mask.cp_world
               << " sq=" << c.lengths.sq << " sk=" << c.lengths.sk << " total=" << c.lengths.total;
  }
};

/// What brute force says of one case; false, with a failure reported, where the header says otherwise.
bool agrees(const Case& c) {
  const Mask mask = normalised(c.mask);
  const auto [sq, sk, total] = c.lengths;
  std::array<KeySet, max_length> seen{};
  KeyRange before;
  for (int i = 0; i < sq; ++i) {
    for (int j = 0; j < sk; ++j) seen[i] |= KeySet{testing::visible(c.mask, i, j, sq, sk, total)} << j;
    const KeyRange range = visible_keys(mask, c.lengths, i);
    if (range.begin < 0 || range.end > sk || set_of(range) != seen[i]) {
      ADD_FAILURE() << c << ": row " << i << " sees " << range.begin << " .. " << range.end << ", not the set "
                    << std::hex << seen[i];
      return false;
    }
    if (i > 0 && (range.begin < before.begin || range.end < before.end)) {
      ADD_FAILURE() << c << ": a bound decreases at row " << i;
      return false;
    }
    before = range;
  }
  for (int first = 0; first < sq; ++first) {
    KeySet some = 0;
    KeySet every = ~KeySet{0};
    for (int last = first; last < sq; ++last) {
      some |= seen[last];
      every &= seen[last];
      if (set_of(keys_of_some_row(mask, c.lengths, first, last)) != some) {
        ADD_FAILURE() << c << ": keys_of_some_row of rows " << first << " .. " << last << " is not the union";
        return false;
      }
      if (set_of(keys_of_every_row(mask, c.lengths, first, last)) != every) {
        ADD_FAILURE() << c << ": keys_of_every_row of rows " << first << " .. " << last << " is not the intersection";
        return false;
      }
    }
  }
  return true;
}

/// Runs `check` on every mask without context parallel.
template <typename Check>
void for_each_mask(Check check) {
  for (const bool causal : {false, true}) {
    for (const int left : {-1, 0, 1, 2, 5, INT_MAX}) {
      for (const int right : {-1, 0, 1, 2, 5, INT_MAX}) {
        for (const int chunk : {0, 1, 2, 3, 5, INT_MAX}) {
          if (!check(testing::MaskArguments{.causal = causal, .left = left, .right = right, .chunk = chunk})) return;
        }
      }
    }
  }
}

class VisibilityOfRows : public ::testing::TestWithParam<int> {};

TEST_P(VisibilityOfRows, MatchesTheRulesOnOneRank) {
  const int sq = GetParam();
  for (int sk = 0; sk <= max_length; ++sk) {
    for_each_mask([&](const testing::MaskArguments& mask) { return agrees({mask, {sq, sk, sk}}); });
  }
}

TEST_P(VisibilityOfRows, MatchesTheRulesOnEachRankOfContextParallel) {
  const int sq = GetParam();
  for (int world = 2; world <= 3; ++world) {
    for (int rank = 0; rank < world; ++rank) {
      for (int sk = 0; sk <= max_length; ++sk) {
        // The totals of a rank that holds exactly its share are sk * world - (world - 1) + rank + 0 .. world
        // - 1; around them, and far away, the rank holds more or fewer.
        std::vector<int> totals{0, 1, sk, 4 * max_length};
        for (int total = (sk - 1) * world; total <= (sk + 1) * world; ++total) {
          if (total > 1) totals.push_back(total);
        }
        for (const int total : totals) {
          for_each_mask([&](testing::MaskArguments mask) {
            mask.cp_world = world;
            mask.cp_rank = rank;
            return agrees({mask, {sq, sk, total}});
          });
        }
      }
    }
  }
}

INSTANTIATE_TEST_SUITE_P(QueryLengths, VisibilityOfRows, ::testing::Range(0, max_length + 1));

TEST(Visibility, RanksShareOutTheKeysOfOneRow) {
  constexpr int total = 23;
  constexpr int sq = 7;
  for (int world = 2; world <= 5; ++world) {
    for (int row = 0; row < sq; ++row) {
      int seen = 0;
      for (int rank = 0; rank < world; ++rank) {
        const int share = (total - rank + world - 1) / world;
        const Mask mask{.left = 11, .right = 2, .cp_world = world, .cp_rank = rank};
        seen += visible_keys(mask, {sq, share, total}, row).size();
      }
      EXPECT_EQ(seen, visible_keys({.left = 11, .right = 2}, {sq, total, total}, row).size())
          << "row " << row << ", " << world << " ranks";
    }
  }
}

TEST(Visibility, BoundedMeansThatARuleHidesKeys) {
  EXPECT_FALSE(Mask{}.bounded());
  EXPECT_FALSE((Mask{.cp_world = 4, .cp_rank = 1}.bounded()));
  EXPECT_TRUE(Mask{.left = 0}.bounded());
  EXPECT_TRUE(Mask{.right = 0}.bounded());
  EXPECT_TRUE(Mask{.chunk = 1}.bounded());
}

// Evaluated by the compiler, which refuses whatever overflows.
constexpr Lengths longest{INT_MAX, INT_MAX, INT_MAX};
static_assert(visible_keys({}, longest, INT_MAX - 1).size() == INT_MAX);
static_assert(visible_keys({.right = 0}, longest, 0).size() == 1);
static_assert(visible_keys({.left = INT_MAX, .right = INT_MAX, .chunk = INT_MAX}, longest, INT_MAX - 1).size() ==
              INT_MAX);
static_assert(visible_keys({.chunk = INT_MAX}, {INT_MAX, 1, 1}, 0).empty());
static_assert(visible_keys({.left = 0, .right = 0}, longest, INT_MAX - 1).begin == INT_MAX - 1);
static_assert(visible_keys({.cp_world = INT_MAX, .cp_rank = INT_MAX - 1}, {1, 1, INT_MAX}, 0).size() == 1);
static_assert(visible_keys({.right = INT_MAX, .cp_world = INT_MAX, .cp_rank = 0}, {INT_MAX, INT_MAX, 1}, 0).size() ==
              1);
static_assert(floor_divide(-1, 3) == -1 && floor_divide(-3, 3) == -1 && floor_divide(-4, 3) == -2 &&
              floor_divide(5, 3) == 1 && floor_divide(0, 3) == 0);
static_assert(KeyRange{3, 2}.size() == 0 && KeyRange{2, 2}.empty() && KeyRange{2, 5}.size() == 3);

}  // namespace
}  // namespace mate
