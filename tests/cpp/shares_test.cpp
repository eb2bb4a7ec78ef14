// The even cut of a call's work: every grain is taken once, and all that concerns a tile agrees on its parts.
#include "attention/shares.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <map>
#include <random>
#include <set>
#include <vector>

namespace mate {
namespace {

TEST(Shares, EveryGrainHasOneWorkerAndNobodyHasMoreThanNeeded) {
  for (const int grains : {1, 2, 7, 64, 131, 132, 133, 1000, 2'000'000'000}) {
    for (const int workers : {1, 2, 7, 132, 148}) {
      const Shares shares(grains, workers);
      int end = 0;
      for (int worker = 0; worker < workers; ++worker) {
        const Share share = shares.of(worker);
        EXPECT_EQ(share.begin, end);
        EXPECT_LE(share.end - share.begin, divide_up(grains, workers));
        end = share.end;
        if (share.begin == share.end) continue;
        EXPECT_EQ(shares.worker_of(share.begin), worker);
        EXPECT_EQ(shares.worker_of(share.end - 1), worker);
      }
      EXPECT_EQ(end, grains);
    }
  }
}

TEST(Shares, TilesOfOneSizeAreCutAlikeWhereThatCostsLittle) {
  EXPECT_EQ(Shares(8 * 64, 132, 64).each, 4);          // 16 parts of each of 8 tiles
  EXPECT_EQ(Shares(1024 * 8, 132, 8).each, 64);        // 63 would do, but cut most tiles
  EXPECT_EQ(Shares(1024 * 32, 132, 32).each, 256);     // 249
  EXPECT_EQ(Shares(8 * 60, 132, 60).each, 4);          // 15 parts
  EXPECT_EQ(Shares(8 * 61, 132, 61).each, 4);          // 61 is no multiple of anything near
  EXPECT_EQ(Shares(100 * 100, 132, 100).each, 76);     // 100 would leave a quarter of the workers idle
  EXPECT_EQ(Shares(2000 * 100, 132, 100).each, 1600);  // 1516
  EXPECT_EQ(Shares(0, 132, 1).each, 0);
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
  for (int round = 0; round < 3000; ++round) {
    const std::vector<BlockRange> tiles = random_tiles(numbers);
    const int workers = 1 + static_cast<int>(numbers() % 30);
    const int distance = 1 << numbers() % 5;
    const Cut cut{static_cast<Cut::Kind>(numbers() % 3), 1 + static_cast<int>(numbers() % 9)};
    std::vector<int> begins{0};
    for (const BlockRange tile : tiles) begins.push_back(begins.back() + grains_of(cut, tile, distance));
    const int grains = begins.back();
    const Shares shares(grains, workers, numbers() % 2 == 0 ? grains_of(cut, tiles[0], distance) : 0);

    std::set<int> slots;
    std::map<int, std::vector<int>> tiles_of_counter;
    for (std::size_t i = 0; i < tiles.size(); ++i) {
      const Share tile{begins[i], begins[i + 1]};
      std::vector<TilePart> parts;
      int next_block = tiles[i].begin;
      for (int at = tile.begin; at < tile.end;) {
        const Share share = shares.of(shares.worker_of(at));
        const int count = cut.takes_single_grains() ? 1 : std::min(tile.end, share.end) - at;
        const BlockRange blocks = blocks_of_grains(cut, tiles[i], distance, at - tile.begin, count);
        if (tiles[i].size() > 0) {
          EXPECT_EQ(blocks.begin, next_block);
          EXPECT_GT(blocks.size(), 0);
          next_block = blocks.end;
        }
        parts.push_back(part_of(cut, shares, tile, at));
        at += count;
        // A worker reports its parts of a tile together, with the last of them.
        EXPECT_EQ(parts.back().reported == 0, at < std::min(tile.end, share.end));
      }
      EXPECT_EQ(next_block, tiles[i].size() > 0 ? tiles[i].end : tiles[i].begin);
      ASSERT_EQ(parts.size(), parts[0].count);
      int reported = 0;
      for (const TilePart& part : parts) reported += part.reported;
      EXPECT_EQ(reported, parts[0].count);
      for (int j = 0; j < parts[0].count; ++j) {
        EXPECT_EQ(parts[j].index, j);
        EXPECT_EQ(parts[j].count, parts[0].count);
        EXPECT_EQ(parts[j].counter, parts[0].counter);
        EXPECT_LT(parts[j].counter, counters_of(workers));
        if (parts[0].count == 1) continue;
        EXPECT_EQ(parts[j].slot(j), parts[0].slot(j));
        EXPECT_TRUE(slots.insert(parts[j].slot(j)).second) << "a slot holds two parts";
        EXPECT_LT(parts[j].slot(j), slots_of(cut, workers, grains));
      }
      // Tiles share a counter only where one worker has all of them, one after another.
      if (parts[0].count > 1) {
        const bool alone = shares.worker_of(tile.begin) == shares.worker_of(tile.end - 1);
        tiles_of_counter[parts[0].counter].push_back(alone ? 0 : 1);
      }
    }
    for (const auto& [counter, shared] : tiles_of_counter) {
      for (const int with_others : shared) EXPECT_TRUE(with_others == 0 || shared.size() == 1);
    }
  }
}

TEST(Shares, AnAlignedCutFollowsFromTheSequenceAlone) {
  for (const int sk : {1, 100, 1024, 2048, 8192, 65536, 1 << 20}) {
    const int distance = aligned_distance({1, sk, sk}, 4, 128);
    EXPECT_EQ(distance, aligned_distance({16, sk, sk}, 4, 128));
    EXPECT_EQ(aligned_distance({17, sk, sk}, 4, 128), max_length);
    const Cut cut{Cut::Kind::aligned};
    // Whatever blocks a tile needs, it is cut at the same keys.
    const BlockRange all{0, static_cast<int>(divide_up(sk, 128))};
    for (int begin = 0; begin < all.end; begin += 1 + all.end / 7) {
      const BlockRange tile{begin, all.end};
      for (int i = 1; i < grains_of(cut, tile, distance); ++i) {
        EXPECT_EQ(blocks_of_grains(cut, tile, distance, i, 1).begin % distance, 0);
      }
    }
  }
}

}  // namespace
}  // namespace mate
