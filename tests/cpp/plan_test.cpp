// How the work is cut up: every row in one tile, every key that a tile sees in one block of one split, and
// numbers of splits that follow from the lengths alone.
#include "cpu/plan.h"

#include <gtest/gtest.h>
#include <mate/attention.h>

#include <algorithm>
#include <climits>
#include <cstdint>
#include <set>
#include <utility>
#include <vector>

#include "attention/tiling.h"
#include "random.h"
#include "visible.h"

namespace mate {
namespace {

using testing::Random;

TEST(Tiles, CoverEveryPackedRowOnce) {
  for (const int pack : {1, 2, 3, 8, 71}) {
    for (const int tile_rows : {1, 2, 3, 16, 64}) {
      const Tiling tiling{.tile_rows = tile_rows, .block_keys = 64, .pack = pack};
      for (int sq = 0; sq <= 70; ++sq) {
        long long next = 0;
        for (int tile = 0; tile < tiles_of(tiling, sq); ++tile) {
          const TileRows rows = rows_of_tile(tiling, sq, tile);
          ASSERT_EQ(rows.first, next);
          ASSERT_GE(rows.count(), 1);
          ASSERT_LE(rows.count(), tile_rows);
          next = rows.last + 1;
        }
        ASSERT_EQ(next, static_cast<long long>(sq) * pack) << "sq " << sq << ", " << tile_rows << " rows a tile";
      }
    }
  }
}

TEST(Tiles, CountRowsIn64Bits) {
  constexpr Tiling tiling{.tile_rows = 128, .block_keys = 64, .pack = 64};
  static_assert(tiles_of(tiling, INT_MAX) == 1 << 30);
  static_assert(rows_of_tile(tiling, INT_MAX, (1 << 30) - 1).last == 64LL * INT_MAX - 1);
  static_assert(keys_of_tile(tiling, {.right = 0}, {INT_MAX, INT_MAX, INT_MAX}, (1 << 30) - 1).end == INT_MAX);
}

TEST(Blocks, OfATileHoldExactlyTheKeysThatItSees) {
  Random random(0);
  for (int round = 0; round < 20000; ++round) {
    const Tiling tiling{.tile_rows = static_cast<int>(random.integer(1, 9)),
                        .block_keys = static_cast<int>(random.integer(1, 7)),
                        .pack = static_cast<int>(random.integer(1, 4))};
    testing::MaskArguments mask;
    mask.causal = random.chance(0.3);
    mask.left = random.integer(-1, 9);
    mask.right = random.integer(-1, 9);
    mask.chunk = random.integer(0, 9);
    mask.cp_world = random.integer(1, 3);
    mask.cp_rank = random.integer(0, mask.cp_world - 1);
    Lengths lengths{static_cast<int>(random.integer(0, 20)), static_cast<int>(random.integer(0, 40)), 0};
    lengths.total = mask.cp_world == 1 ? lengths.sk : static_cast<int>(random.integer(0, 120));
    const Mask normalised{static_cast<int>(mask.left), mask.causal ? 0 : static_cast<int>(mask.right),
                          static_cast<int>(mask.chunk), static_cast<int>(mask.cp_world),
                          static_cast<int>(mask.cp_rank)};

    for (int tile = 0; tile < tiles_of(tiling, lengths.sq); ++tile) {
      const TileRows rows = rows_of_tile(tiling, lengths.sq, tile);
      std::set<int> seen;
      for (long long row = rows.first; row <= rows.last; ++row) {
        for (int j = 0; j < lengths.sk; ++j) {
          if (testing::visible(mask, row / tiling.pack, j, lengths.sq, lengths.sk, lengths.total)) {
            seen.insert(j / tiling.block_keys);
          }
        }
      }
      const BlockRange blocks = blocks_of_tile(tiling, normalised, lengths, tile);
      std::set<int> expected;
      for (int block = blocks.begin; block < blocks.end; ++block) expected.insert(block);
      ASSERT_EQ(seen, expected) << "round " << round << ", tile " << tile;
    }
  }
}

TEST(Splits, PartitionTheBlocksEvenly) {
  for (int splits = 1; splits <= max_splits; splits += splits < 10 ? 1 : 41) {
    for (int size = 0; size <= 70; ++size) {
      const BlockRange blocks{5, 5 + size};
      int next = blocks.begin;
      for (int split = 0; split < splits; ++split) {
        const BlockRange part = blocks_of_split(blocks, split, splits);
        ASSERT_EQ(part.begin, next);
        ASSERT_GE(part.size(), size / splits);
        ASSERT_LE(part.size(), (size + splits - 1) / splits);
        next = part.begin + part.size();
      }
      ASSERT_EQ(next, blocks.end) << size << " blocks, " << splits << " splits";
    }
  }
  constexpr BlockRange all{0, INT_MAX};
  static_assert(blocks_of_split(all, max_splits - 1, max_splits).end == INT_MAX);
}

/// A problem that has lengths and no tensors.
class LengthsOnly {
 public:
  Problem problem;

  LengthsOnly(std::vector<int> query_lengths, std::vector<int> key_lengths, int heads_q = 8, int heads_k = 2)
      : query_lengths_(std::move(query_lengths)), key_lengths_(std::move(key_lengths)) {
    problem.batch = static_cast<int>(query_lengths_.size());
    problem.heads_q = heads_q;
    problem.heads_k = heads_k;
    problem.head_dim = problem.head_dim_v = 64;
    problem.queries.rows = *std::max_element(query_lengths_.begin(), query_lengths_.end());
    problem.queries.seqused = {query_lengths_.data()};
    problem.keys.rows = *std::max_element(key_lengths_.begin(), key_lengths_.end());
    problem.keys.slots = problem.batch;
    problem.keys.seqused = {key_lengths_.data()};
  }
  LengthsOnly(const LengthsOnly&) = delete;

  Plan plan(int workers = 64) const {
    return make_plan(problem, {.min_tile_rows = 16, .max_tile_rows = 16, .block_keys = 64, .workers = workers});
  }
  std::vector<int> splits(int workers = 64) const { return plan(workers).splits; }

 private:
  std::vector<int> query_lengths_, key_lengths_;
};

TEST(Splits, StaysWithinItsLimits) {
  for (const int workers : {1, 2, 3, 132, 100000}) {
    for (const int keys : {0, 1, 64, 1000, 1 << 20, INT_MAX}) {
      for (const bool batch_invariant : {false, true}) {
        LengthsOnly call({1, 0, 5}, {keys, keys, 0});
        call.problem.batch_invariant = batch_invariant;
        const std::vector<int> splits = call.splits(workers);
        ASSERT_EQ(splits.size(), 3U);
        for (const int count : splits) {
          EXPECT_GE(count, 1);
          EXPECT_LE(count, max_splits);
        }
        EXPECT_EQ(splits[1], 1) << "a sequence without queries";
        EXPECT_EQ(splits[2], 1) << "a sequence without keys";
      }
    }
  }
}

TEST(Splits, SharesOutOneLongSequenceAndNotMany) {
  EXPECT_GE(LengthsOnly({1}, {1 << 20}).splits(64)[0], 64);
  EXPECT_EQ(LengthsOnly({1}, {1 << 20}).splits(1)[0], 1);
  EXPECT_EQ(LengthsOnly({1}, {64}).splits(64)[0], 1);
  const LengthsOnly many(std::vector<int>(1000, 1), std::vector<int>(1000, 4096));
  EXPECT_EQ(many.splits(4), std::vector<int>(1000, 1));
}

TEST(Splits, ObeysTheCaller) {
  for (const int n : {1, 2, 3, max_splits}) {
    LengthsOnly call({1, 0, 100}, {100000, 5, 64});
    call.problem.num_splits = n;
    EXPECT_EQ(call.splits(), std::vector<int>(3, n));
    const int metadata[] = {7, 7, 7};
    call.problem.scheduler_metadata = {metadata};
    EXPECT_EQ(call.splits(), std::vector<int>(3, n)) << "with metadata";
  }
}

TEST(Splits, FollowsTheMetadataAndBoundsIt) {
  const int metadata[] = {3, -9, 1, -9, 256, -9, INT_MAX, -9, 0, -9, INT_MIN};
  LengthsOnly call({1, 1, 1, 1, 1, 1}, {100, 100, 100, 100, 100, 100});
  call.problem.scheduler_metadata = {metadata, 2};
  for (const int workers : {1, 64}) {
    EXPECT_EQ(call.splits(workers), (std::vector<int>{3, 1, 256, max_splits, 1, 1}));
  }
}

TEST(Splits, OfABatchInvariantCallIgnoresAllButTheSequence) {
  const std::vector<int> queries{1, 7, 300, 0, 2};
  const std::vector<int> keys{40000, 3000, 5000, 9000, 0};
  LengthsOnly together(queries, keys);
  together.problem.batch_invariant = true;
  const std::vector<int> splits = together.splits();
  EXPECT_GT(splits[0], 1);
  for (std::size_t b = 0; b < queries.size(); ++b) {
    for (const int workers : {1, 2, 500}) {
      LengthsOnly alone({queries[b]}, {keys[b]});
      alone.problem.batch_invariant = true;
      EXPECT_EQ(alone.splits(workers)[0], splits[b]);
      alone.problem.num_splits = 5;
      alone.problem.sm_margin = 3;
      const int metadata = 9;
      alone.problem.scheduler_metadata = {&metadata};
      EXPECT_EQ(alone.splits(workers)[0], splits[b]) << "with num_splits and metadata";
    }
  }
}

TEST(Splits, DoesNotDependOnWhereTheKeysLie) {
  const std::vector<int> queries{1, 7, 30};
  const std::vector<int> keys{40000, 3000, 5};
  const std::vector<int> expected = LengthsOnly(queries, keys).splits();
  EXPECT_GT(expected[0], 1);

  LengthsOnly large(queries, keys);
  large.problem.keys.rows = INT_MAX;
  large.problem.queries.rows = 1000;
  EXPECT_EQ(large.splits(), expected);

  for (const int page_size : {1, 16, 50000}) {
    LengthsOnly paged(queries, keys);
    const int page = 0;  // lengths do not read it
    paged.problem.keys.page_table = &page;
    paged.problem.keys.page_rows = 3;
    paged.problem.keys.rows = page_size;
    paged.problem.keys.table_capacity = table_capacity_of(40000 / page_size + 1, page_size);
    EXPECT_EQ(paged.splits(), expected) << "pages of " << page_size;
  }

  LengthsOnly ragged(queries, keys);
  const int query_offsets[] = {2, 3, 10, 40};
  const int key_offsets[] = {1, 40001, 43001, 43006};
  ragged.problem.queries = {100, {query_offsets}, {}};
  ragged.problem.keys.rows = 50000;
  ragged.problem.keys.cu_seqlens = {key_offsets};
  ragged.problem.keys.seqused = {};
  EXPECT_EQ(ragged.splits(), expected);

  LengthsOnly appended(queries, {39998, 2998, 3});
  appended.problem.keys.rows = 40000;
  appended.problem.keys.appends = true;
  appended.problem.keys.new_rows = 2;
  EXPECT_EQ(appended.splits(), expected);

  LengthsOnly padded(queries, {40100, 3100, 105});
  const int leftpad[] = {100, 100, 100};
  padded.problem.keys.leftpad = {leftpad};
  EXPECT_EQ(padded.splits(), expected);
}

TEST(Splits, CountsOnlyTheBlocksThatAreSeen) {
  LengthsOnly windowed({1}, {1 << 20});
  windowed.problem.mask.left = 100;
  EXPECT_EQ(windowed.splits()[0], 1);
}

TEST(Packing, SharesAGroupUnlessToldOtherwise) {
  LengthsOnly call({1}, {1}, 8, 2);
  EXPECT_EQ(call.plan().tiling.pack, 4);
  call.problem.pack_gqa = 1;
  EXPECT_EQ(call.plan().tiling.pack, 4);
  call.problem.pack_gqa = 0;
  EXPECT_EQ(call.plan().tiling.pack, 1);
}

TEST(SchedulerMetadata, HasASizeThatFollowsFromTheBatch) {
  EXPECT_GE(scheduler_metadata_size(0), 0);
  EXPECT_GE(scheduler_metadata_size(7), 7);
}

}  // namespace
}  // namespace mate
