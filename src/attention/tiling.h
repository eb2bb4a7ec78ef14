// How the work of a call is cut up: tiles of query rows, blocks of keys, splits of the keys of a tile.
//
// The geometry is shared with device code (it includes nothing but its siblings); how many splits a sequence gets each
// backend decides.
#pragma once

#include "attention/visibility.h"

namespace mate {

inline constexpr int max_splits = 256;

/// The shape of the work. Packed row r of a head unit is query row r / pack of head unit * pack + r % pack.
struct Tiling {
  int tile_rows = 0;  ///< packed rows of a tile
  /// Keys of a block. Blocks start at multiples of it, so that a row's sums never depend on its tile.
  int block_keys = 0;
  int pack = 1;  ///< query heads that share a tile: as many as divide a group
};

/// Packed rows first .. last of a tile.
struct TileRows {
  long long first = 0;
  long long last = 0;

  constexpr int count() const { return static_cast<int>(last - first + 1); }
};

/// Key blocks begin <= n < end.
struct BlockRange {
  int begin = 0;
  int end = 0;

  constexpr int size() const { return begin < end ? end - begin : 0; }
};

constexpr long long divide_up(long long a, long long b) { return (a + b - 1) / b; }

constexpr int tiles_of(const Tiling& tiling, int sq) {
  return static_cast<int>(divide_up(static_cast<long long>(sq) * tiling.pack, tiling.tile_rows));
}

constexpr TileRows rows_of_tile(const Tiling& tiling, int sq, int tile) {
  const long long first = static_cast<long long>(tile) * tiling.tile_rows;
  const long long end = first + tiling.tile_rows;
  const long long rows = static_cast<long long>(sq) * tiling.pack;
  return {first, (end < rows ? end : rows) - 1};
}

/// The query row that a packed row belongs to.
constexpr int query_of_row(const Tiling& tiling, long long row) { return static_cast<int>(row / tiling.pack); }

/// The keys that some row of a tile sees.
constexpr KeyRange keys_of_tile(const Tiling& tiling, const Mask& mask, const Lengths& lengths, int tile) {
  const TileRows rows = rows_of_tile(tiling, lengths.sq, tile);
  return keys_of_some_row(mask, lengths, query_of_row(tiling, rows.first), query_of_row(tiling, rows.last));
}

/// The blocks that hold these keys.
constexpr BlockRange blocks_of_keys(const Tiling& tiling, KeyRange keys) {
  if (keys.empty()) return {};
  return {divide(keys.begin, tiling.block_keys), divide(keys.end - 1, tiling.block_keys) + 1};
}

/// The blocks of keys that some row of a tile sees: no other block is read.
constexpr BlockRange blocks_of_tile(const Tiling& tiling, const Mask& mask, const Lengths& lengths, int tile) {
  return blocks_of_keys(tiling, keys_of_tile(tiling, mask, lengths, tile));
}

/// Split `split` of `splits` equal parts of a tile's blocks; some are empty where there are fewer blocks.
constexpr BlockRange blocks_of_split(BlockRange blocks, int split, int splits) {
  const long long size = blocks.size();
  return {blocks.begin + static_cast<int>(size * split / splits),
          blocks.begin + static_cast<int>(size * (split + 1) / splits)};
}

}  // namespace mate
