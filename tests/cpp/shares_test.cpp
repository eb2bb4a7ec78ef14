// The sharing out of a call's work: every block is taken once, and all that concerns a tile agrees on its parts.
#include "attention/shares.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <map>
#include <random>
#include <set>
#include <vector>

namespace mate {
namespace {

TEST(Shares, EveryStepHasOneWorkerAndNobodyHasMoreThanNeeded) {
  for (const int steps : {1, 2, 7, 64, 131, 132, 133, 1000, 2'000'000'000}) {
    for (const int workers : {1, 2, 7, 132, 148}) {
      const Shares shares(steps, workers);
      int end = 0;
      for (int worker = 0; worker < workers; ++worker) {
        const Share share = shares.of(worker);
        EXPECT_EQ(share.begin, end);
        EXPECT_LE(share.end - share.begin, divide_up(steps, workers));
        end = share.end;
        if (share.begin == share.end) continue;
        EXPECT_EQ(shares.worker_of(share.begin), worker);
        EXPECT_EQ(shares.worker_of(share.end - 1), worker);
      }
      EXPECT_EQ(end, steps);
    }
  }
}

TEST(Shares, TilesOfOneSizeAreCutAlikeWhereThatCostsLittle) {
  const auto expect = [](int tiles, int of_tile, int each, bool aligned) {
    Shares shares(tiles * of_tile, 132);
    EXPECT_EQ(shares.align(of_tile), aligned) << tiles << " of " << of_tile;
    EXPECT_EQ(shares.each, each) << tiles << " of " << of_tile;
  };
  expect(8, 64, 4, true);         // 16 parts of each tile
  expect(1024, 8, 64, true);      // 63 would do, but cut most tiles
  expect(1024, 32, 256, true);    // 249
  expect(8, 60, 4, true);         // 15 parts
  expect(8, 61, 4, false);        // 61 is no multiple of anything near
  expect(100, 100, 76, false);    // 100 would leave a quarter of the workers idle
  expect(2000, 100, 1600, true);  // 1516
  expect(0, 1, 0, false);
}

/// With rows before the first sequence and behind the last one, and sequences of none.
TEST(Shares, TilesOfRaggedSequencesHaveNumbersOfTheirOwn) {
  std::mt19937 numbers(1);
  for (int round = 0; round < 5000; ++round) {
    const int pack = 1 + static_cast<int>(numbers() % 5);
    const Tiling tiling{pack * (1 + static_cast<int>(numbers() % 6)), 128, pack};
    std::vector<int> begins = {static_cast<int>(numbers() % 3)};
    for (int b = static_cast<int>(numbers() % 8); b > 0; --b) {
      begins.push_back(begins.back() + static_cast<int>(numbers() % 3 == 0 ? 0 : numbers() % 20));
    }
    const int batch = static_cast<int>(begins.size()) - 1;
    const int rows = begins.back() + static_cast<int>(numbers() % 3);
    std::set<int> taken;
    for (int b = 0; b < batch; ++b) {
      for (int tile = 0; tile < tiles_of(tiling, begins[b + 1] - begins[b]); ++tile) {
        const int number = tile_number(tiling, false, true, rows, b, begins[b], tile);
        EXPECT_TRUE(taken.insert(number).second);
        EXPECT_LT(number, most_tiles(tiling, false, true, rows, batch));
      }
    }
  }
}

/// Tiles of random numbers of blocks, some of none.
std::vector<BlockRange> random_tiles(std::mt19937& numbers) {
  std::vector<BlockRange> tiles(1 + numbers() % 20);
  for (BlockRange& tile : tiles) {
    tile.begin = static_cast<int>(numbers() % 5);
    tile.end = numbers() % 5 == 0 ? 0 : tile.begin + static_cast<int>(numbers() % 40);
  }
  return tiles;
}

TEST(Shares, PartsOfATileMakeItWhole) {
  std::mt19937 numbers(1);
  for (int round = 0; round < 5000; ++round) {
    const std::vector<BlockRange> tiles = random_tiles(numbers);
    int workers = 1 + static_cast<int>(numbers() % 30);
    const Cut cut{static_cast<Cut::Kind>(numbers() % 3), 1 + static_cast<int>(numbers() % 9)};
    // So many steps are a worker's, and he has none of another tile: the last ones of a tile are then of no blocks.
    const int of_part = cut.kind == Cut::Kind::even && numbers() % 2 == 0 ? 1 + static_cast<int>(numbers() % 12) : 0;
    std::vector<TileCut> cuts;
    std::vector<int> begins{0};
    for (const BlockRange blocks : tiles) {
      cuts.emplace_back(cut, blocks, blocks_of_step(numbers() % 2 == 0), 1 << numbers() % 5);
      const int steps = cuts.back().steps();
      begins.push_back(begins.back() + (of_part > 0 ? (steps + of_part - 1) / of_part * of_part : steps));
    }
    Shares shares(begins.back(), workers);
    if (of_part > 0) {
      shares.each = of_part;
      workers = std::max(workers, begins.back() / of_part);
    } else if (numbers() % 2 == 0) {
      shares.align(cuts[0].steps());
    }
    constexpr int slots_of_tile = 64;
    const long long slots_of_call =
        cut.parts_are_grains() ? slots_of_tile * static_cast<long long>(tiles.size()) : slots_of(workers);

    std::set<int> slots;
    std::set<int> counters;
    for (std::size_t i = 0; i < tiles.size(); ++i) {
      const Share tile{begins[i], begins[i + 1]};
      std::vector<TileParts> all;
      int next_block = tiles[i].begin;
      int next_part = 0;
      for (int worker = 0; worker < workers; ++worker) {
        const Share share = shares.of(worker);
        const int begin = std::max(share.begin, tile.begin);
        const int end = std::min(share.end, tile.end);
        if (begin >= end) continue;
        const BlockRange blocks = cuts[i].blocks_of_steps(begin - tile.begin, end - tile.begin);
        if (tiles[i].size() > 0) {
          EXPECT_TRUE(of_part == 0 || blocks.size() > 0) << "a part without blocks";
          if (blocks.size() == 0) continue;
          EXPECT_EQ(blocks.begin, next_block);
          next_block = blocks.end;
          // With no more than the grain it begins last, a worker has no more than its steps.
          EXPECT_LE(blocks.size(), (end - begin) * cuts[i].step + cuts[i].distance - 1);
        }
        const TileParts parts = parts_of(cut, shares, tile, cuts[i], worker, blocks,
                                         cut.parts_are_grains() ? static_cast<int>(i) * slots_of_tile : 0);
        EXPECT_EQ(parts.first, next_part);
        next_part += parts.taken;
        all.push_back(parts);
        if (!cut.parts_are_grains()) continue;
        // The blocks of each part are those of a grain.
        int part = parts.first + parts.taken;
        for (int n = blocks.end; n > blocks.begin; n = cuts[i].begin_of_grain(n - 1)) {
          const int first = cuts[i].begin_of_grain(n - 1);
          EXPECT_EQ(cuts[i].grains_between(tiles[i].begin, first), --part);
          EXPECT_GE(first, blocks.begin);
        }
        EXPECT_EQ(part, parts.first + (tiles[i].size() == 0 ? 1 : 0));
      }
      EXPECT_EQ(next_block, tiles[i].size() > 0 ? tiles[i].end : tiles[i].begin);
      ASSERT_FALSE(all.empty());
      EXPECT_EQ(next_part, all[0].count);
      for (const TileParts& parts : all) {
        EXPECT_EQ(parts.count, all[0].count);
        EXPECT_EQ(parts.counter, all[0].counter);
        EXPECT_LT(parts.counter, counters_of(workers));
        if (parts.count == 1) continue;
        for (int part = 0; part < parts.count; ++part) EXPECT_EQ(parts.slot(part), all[0].slot(part));
      }
      for (int part = 0; part < all[0].count && all[0].count > 1; ++part) {
        EXPECT_TRUE(slots.insert(all[0].slot(part)).second) << "a slot holds two parts";
        EXPECT_LT(all[0].slot(part), slots_of_call);
      }
      EXPECT_TRUE(all.size() == 1 || counters.insert(all[0].counter).second) << "a counter counts for two tiles";
    }
  }
}

TEST(Shares, ACountedCutMakesNoMorePartsThanAskedFor) {
  for (int blocks = 1; blocks < 40; ++blocks) {
    for (int parts = 1; parts < 12; ++parts) {
      const TileCut cut({Cut::Kind::counted, parts}, {3, 3 + blocks}, 1);
      EXPECT_LE(cut.grains(), parts);
      EXPECT_TRUE(blocks % parts != 0 || cut.grains() == parts);
    }
  }
}

constexpr CutShape shape_of(int group, int heads_k, int head_dim = 128, int head_dim_v = 128, int block_keys = 128) {
  return {group, heads_k, head_dim, head_dim_v, block_keys};
}

int distance_of(int sq, int sk, const CutShape& shape) { return AlignedCut({sq, sk, sk}, shape).distance(); }

TEST(Shares, AnAlignedCutFollowsFromTheSequenceAlone) {
  for (const int sk : {0, 1, 100, 1024, 2048, 8192, 65536, 1 << 20, max_length}) {
    for (const CutShape& shape : {shape_of(4, 8), shape_of(1, 32), shape_of(128, 1, 64, 512, 64)}) {
      for (const int sq : {1, 16, 512, 100'000}) {
        const int distance = distance_of(sq, sk, shape);
        const BlockRange all{0, static_cast<int>(divide_up(sk, shape.block_keys))};
        EXPECT_LE(TileCut({Cut::Kind::aligned}, all, 1, distance).grains(), most_aligned_parts);
        EXPECT_GE(distance, least_aligned_blocks);
        // Whatever blocks a tile needs, it is cut at the same keys.
        for (int begin = 0; begin < all.end; begin += 1 + all.end / 7) {
          const TileCut cut({Cut::Kind::aligned}, {begin, all.end}, 1, distance);
          for (int n = begin; n < all.end; n += 1 + all.end / 50) {
            EXPECT_TRUE(cut.begin_of_grain(n) % distance == 0 || cut.begin_of_grain(n) == begin);
          }
        }
      }
    }
  }
}

TEST(Shares, AnAlignedCutHasWorkForAllAndCheapParts) {
  EXPECT_EQ(distance_of(1, 1024, shape_of(4, 8)), 2);
  EXPECT_EQ(distance_of(1, 8192, shape_of(4, 8)), 4);      // 128 parts of 8 heads
  EXPECT_EQ(distance_of(1, 8192, shape_of(1, 32)), 16);    // 128 parts of 32
  EXPECT_EQ(distance_of(1, 131072, shape_of(4, 8)), 16);   // more, to be even beside others
  EXPECT_EQ(distance_of(16, 8192, shape_of(4, 8)), 16);    // more rows, longer parts
  EXPECT_EQ(distance_of(512, 16384, shape_of(4, 8)), 32);  // more yet
  EXPECT_GE(distance_of(16384, 16384, shape_of(4, 8)), 128);
}

TEST(Shares, WhatIsLeftWholeIsNotCutWithFewerKeysEither) {
  for (const CutShape& shape : {shape_of(4, 8), shape_of(1, 32), shape_of(128, 1, 64, 512, 64)}) {
    for (int sq = 1; sq < 40'000; sq += 1 + sq / 3) {
      for (int most = 1; most < 300'000; most += 1 + most / 2) {
        if (!AlignedCut({sq, most, most}, shape).leaves_whole()) continue;
        for (int sk = 0; sk <= most; sk += 1 + sk / 5) {
          EXPECT_GE(static_cast<long long>(distance_of(sq, sk, shape)) * shape.block_keys, sk);
        }
      }
    }
  }
}

}  // namespace
}  // namespace mate
