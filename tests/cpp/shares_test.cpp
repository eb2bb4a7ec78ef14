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

TEST(Shares, EveryGrainHasOneWorkerAndSharesDifferByOne) {
  for (const long long grains : {1LL, 2LL, 7LL, 64LL, 131LL, 132LL, 133LL, 1000LL, 5'000'000'000LL}) {
    for (const int workers : {1, 2, 7, 132, 148}) {
      long long end = 0;
      for (int worker = 0; worker < workers; ++worker) {
        const Share share = share_of(grains, workers, worker);
        if (share.begin == share.end) {
          EXPECT_GE(worker, grains);
          continue;
        }
        EXPECT_EQ(share.begin, end);
        EXPECT_LE(share.end - share.begin, grains / std::min<long long>(workers, grains) + 1);
        EXPECT_EQ(worker_of(grains, workers, share.begin), worker);
        EXPECT_EQ(worker_of(grains, workers, share.end - 1), worker);
        end = share.end;
      }
      EXPECT_EQ(end, grains);
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
  for (int round = 0; round < 3000; ++round) {
    const std::vector<BlockRange> tiles = random_tiles(numbers);
    const int workers = 1 + static_cast<int>(numbers() % 30);
    const int distance = 1 << numbers() % 5;
    const Cut cut{static_cast<Cut::Kind>(numbers() % 3), 1 + static_cast<int>(numbers() % 9)};
    std::vector<long long> begins{0};
    for (const BlockRange tile : tiles) begins.push_back(begins.back() + grains_of(cut, tile, distance));
    const long long grains = begins.back();

    std::set<int> slots;
    std::map<int, std::vector<int>> tiles_of_counter;
    for (std::size_t i = 0; i < tiles.size(); ++i) {
      const Share tile{begins[i], begins[i + 1]};
      std::vector<TilePart> parts;
      int next_block = tiles[i].begin;
      for (long long at = tile.begin; at < tile.end;) {
        const Share share = share_of(grains, workers, worker_of(grains, workers, at));
        const long long count = cut.takes_single_grains() ? 1 : std::min(tile.end, share.end) - at;
        const BlockRange blocks = blocks_of_grains(cut, tiles[i], distance, static_cast<int>(at - tile.begin),
                                                   static_cast<int>(count));
        if (tiles[i].size() > 0) {
          EXPECT_EQ(blocks.begin, next_block);
          EXPECT_GT(blocks.size(), 0);
          next_block = blocks.end;
        }
        parts.push_back(part_of(cut, grains, workers, tile, at));
        at += count;
      }
      EXPECT_EQ(next_block, tiles[i].size() > 0 ? tiles[i].end : tiles[i].begin);
      ASSERT_EQ(parts.size(), parts[0].count);
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
        const int first = worker_of(grains, workers, tile.begin);
        const bool alone = first == worker_of(grains, workers, tile.end - 1);
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
