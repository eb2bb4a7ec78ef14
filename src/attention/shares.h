// How the work of a call is shared out evenly: the keys of tiles are cut into grains, all grains of the call are
// counted in one row, and each worker takes as many of them, one after another, as any other.
//
// Shared with device code: includes nothing but its siblings.
#pragma once

#include "attention/tiling.h"

namespace mate {

/// What a grain is.
struct Cut {
  enum class Kind {
    even,     ///< `distance` blocks of keys; a worker that has several grains of one tile takes them as one part
    counted,  ///< one of `size` equal parts of a tile's blocks, each taken by itself
    aligned   ///< the blocks between two multiples of a sequence's own distance, each taken by itself
  };
  Kind kind = Kind::even;
  int size = 1;

  /// Whether a worker takes one grain at a time, so that parts do not depend on how many workers there are.
  constexpr bool takes_single_grains() const { return kind != Kind::even; }
};

/// Parts that an aligned cut makes of a sequence's keys.
inline constexpr int most_aligned_parts = 64;

/// The distance, in blocks, of an aligned cut: of a sequence with so many packed rows and keys. It must depend on
/// nothing else, or bits would. Where queries are many there are tiles enough.
constexpr int aligned_distance(const Lengths& lengths, int group, int block_keys) {
  constexpr int few_rows = 64;
  if (static_cast<long long>(lengths.sq) * group > few_rows) return max_length;
  constexpr int usual_parts = 16;  // more only where a part would be longer than this
  constexpr int longest = 16;
  const long long blocks = divide_up(lengths.sk, block_keys);
  int distance = 1;
  while ((distance < longest && distance * usual_parts < blocks) || distance * most_aligned_parts < blocks)
    distance *= 2;
  return distance;
}

/// The distance of an even cut: a tile with few rows takes less time a block.
constexpr int even_distance(bool few_rows) { return few_rows ? 2 : 1; }

/// Grains of a tile that needs these blocks of keys. One that needs none is a grain too: its rows are written.
constexpr int grains_of(const Cut& cut, BlockRange blocks, int distance) {
  const int size = blocks.size();
  if (size == 0) return 1;
  if (cut.kind == Cut::Kind::counted) return cut.size < size ? cut.size : size;
  if (cut.kind == Cut::Kind::aligned) return (blocks.end - 1) / distance - blocks.begin / distance + 1;
  return (size - 1) / distance + 1;
}

/// The blocks of grains `first` .. `first + count` of a tile; count is 1 where single grains are taken.
constexpr BlockRange blocks_of_grains(const Cut& cut, BlockRange blocks, int distance, int first, int count) {
  if (blocks.size() == 0) return blocks;
  if (cut.kind == Cut::Kind::counted) return blocks_of_split(blocks, first, grains_of(cut, blocks, distance));
  if (cut.kind == Cut::Kind::even) {
    const int end = blocks.begin + (first + count) * distance;
    return {blocks.begin + first * distance, end < blocks.end ? end : blocks.end};
  }
  const long long begin = (static_cast<long long>(blocks.begin / distance) + first) * distance;
  const long long end = begin + distance;
  return {begin > blocks.begin ? static_cast<int>(begin) : blocks.begin,
          end < blocks.end ? static_cast<int>(end) : blocks.end};
}

/// Grains of one worker, or of one tile.
struct Share {
  int begin = 0;
  int end = 0;
};

/// How `grains` grains are shared out among `workers` workers: each takes as many as there must be for all to be taken,
/// so that the last ones may have less, or nothing. 32 bits, since this is much of what a short call takes on a GPU.
struct Shares {
  int grains = 0;
  int each = 0;

  constexpr Shares() = default;
  /// Where all tiles have `of_tile` grains (else it is 0), a worker rather takes a little more than cuts a tile that
  /// could be left whole, or cuts tiles at other places than its neighbours: parts have to be merged.
  constexpr Shares(int grains, int workers, int of_tile = 0)
      : grains(grains),
        each(static_cast<int>((static_cast<unsigned>(grains) + workers - 1U) / static_cast<unsigned>(workers))) {
    if (of_tile == 0 || each == 0) return;
    const auto tile = static_cast<unsigned>(of_tile);
    const auto needed = static_cast<unsigned>(each);
    const unsigned parts = needed < tile ? tile / needed : 1;
    const unsigned fitting = needed < tile ? (tile + parts - 1) / parts : (needed + tile - 1) / tile * tile;
    if (needed < tile && fitting * parts != tile) return;
    if (fitting - needed <= needed / 16) each = static_cast<int>(fitting);
  }

  constexpr Share of(int worker) const { return {first_of(worker), first_of(worker + 1)}; }

  /// The worker that takes a grain.
  constexpr int worker_of(int grain) const {
    return static_cast<int>(static_cast<unsigned>(grain) / static_cast<unsigned>(each));
  }

 private:
  constexpr int first_of(int worker) const {
    const unsigned first = static_cast<unsigned>(worker) * static_cast<unsigned>(each);
    return first < static_cast<unsigned>(grains) ? static_cast<int>(first) : grains;
  }
};

/// A part of a tile's keys, and where the results of it and of the other parts lie until they are merged. A part that
/// is the whole has its results written at once.
struct TilePart {
  int index = 0;
  int count = 1;
  int first_slot = 0;  ///< of part 0
  int next_slot = 0;   ///< of part 1; from there on they are `step` apart
  int step = 1;
  int counter = 0;   ///< of the parts that are done
  int reported = 1;  ///< parts that are done with this one and were not counted before: 0 if more of them follow

  constexpr int slot(int part) const { return part == 0 ? first_slot : next_slot + (part - 1) * step; }
};

/// Slots that the parts of a call need at most, and counters: `grains` bounds how many there are where single grains
/// are taken.
constexpr long long slots_of(const Cut& cut, int workers, long long grains) {
  return cut.takes_single_grains() ? grains : 2LL * workers;
}
constexpr int counters_of(int workers) { return 2 * workers; }

/// The part of a tile that begins with grain `at`. Each worker shares at most the first and the last of its tiles with
/// others.
constexpr TilePart part_of(const Cut& cut, const Shares& shares, Share tile, int at) {
  TilePart part;
  const int first = shares.worker_of(tile.begin);
  const int last = shares.worker_of(tile.end - 1);
  // Two, since a worker may have begun its last tile with others while its own earlier ones are not done.
  part.counter = 2 * first + (first == last);
  if (cut.takes_single_grains()) {
    part.index = at - tile.begin;
    part.count = tile.end - tile.begin;
    part.first_slot = tile.begin;
    part.next_slot = tile.begin + 1;
    const Share share = shares.of(shares.worker_of(at));
    const int begin = share.begin > tile.begin ? share.begin : tile.begin;
    const int end = share.end < tile.end ? share.end : tile.end;
    part.reported = at + 1 == end ? end - begin : 0;
    return part;
  }
  part.index = shares.worker_of(at) - first;
  part.count = last - first + 1;
  part.first_slot = 2 * first + 1;
  part.next_slot = 2 * (first + 1);
  part.step = 2;
  return part;
}

}  // namespace mate
