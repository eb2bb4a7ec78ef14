// How the work of a call is shared out evenly (stream-K): the work of all tiles is counted in one row of steps, and
// each worker has as many of them, one after another, as any other. What is not cut is a grain, a run of blocks of keys
// of a tile: a worker takes the grains that begin in its steps.
//
// Shared with device code: includes nothing but its siblings.
#pragma once

#include "attention/tiling.h"

namespace mate {

/// What a grain is.
struct Cut {
  enum class Kind {
    even,     ///< the blocks of a step; all that a worker has of a tile is one part
    counted,  ///< one of `size` parts of a tile's blocks, alike but for the last ones
    aligned   ///< the blocks between two multiples of a sequence's own distance
  };
  Kind kind = Kind::even;
  int size = 1;

  /// Whether each grain is a part, so that parts do not depend on how many workers there are.
  constexpr bool parts_are_grains() const { return kind != Kind::even; }
};

/// What all sequences of a call have in common, as far as an aligned cut may depend on it.
struct CutShape {
  int group = 1;  ///< query heads of a key head
  int heads_k = 1;
  int head_dim = 0;
  int head_dim_v = 0;
  int block_keys = 0;
};

/// Parts that an aligned cut makes of a sequence's keys, and blocks of a part, but for the last.
inline constexpr int most_aligned_parts = 64;
inline constexpr int least_aligned_blocks = 2;

/// How a sequence of these lengths is cut. It must depend on nothing else, or bits would.
class AlignedCut {
 public:
  constexpr AlignedCut(const Lengths& lengths, const CutShape& shape)
      : blocks_((static_cast<unsigned>(lengths.sk) + shape.block_keys - 1U) / shape.block_keys),
        heads_(shape.heads_k),
        block_bytes_(static_cast<long long>(shape.block_keys) * (shape.head_dim + shape.head_dim_v) * element_bytes) {
    constexpr long long tile_rows = 64;  // of one or two of them
    const long long rows = static_cast<long long>(lengths.sq) * shape.group;
    tiles_ = (rows + tile_rows - 1) / tile_rows * shape.heads_k;
    part_bytes_ = (rows < 2 * tile_rows ? rows : 2 * tile_rows) * shape.head_dim_v * sum_bytes;
  }

  /// The distance of the cut, in blocks.
  constexpr int distance() const {
    long long distance = least_aligned_blocks;
    while (distance < blocks_ &&
           (distance * most_aligned_parts < blocks_ || distance * block_bytes_ < least_ratio * part_bytes_ ||
            (distance < longest && distance * workers < blocks_ * heads_) ||
            distance * tiles_enough < blocks_ * tiles_))
      distance *= 2;
    return static_cast<int>(distance);
  }

  /// Whether no sequence of as many rows, and of as many keys or fewer, is cut.
  constexpr bool leaves_whole() const {
    return blocks_ <= least_aligned_blocks || blocks_ * block_bytes_ <= least_ratio * part_bytes_ ||
           tiles_ >= tiles_enough;
  }

 private:
  static constexpr long long workers = 128;  // about as many as there are: a sequence that is alone has work for all
  static constexpr long long longest = 16;   // but shares of many sequences are even
  static constexpr long long tiles_enough = 16 * workers;
  /// A part's sums are written and read again: its keys and values are to be so many times as many bytes, counted as if
  /// they were of 16 bits.
  static constexpr long long least_ratio = 16;
  static constexpr long long element_bytes = 2;
  static constexpr long long sum_bytes = 2 * 4;

  long long blocks_;
  long long heads_;
  long long tiles_ = 0;
  long long part_bytes_ = 0;
  long long block_bytes_;
};

/// Blocks of a step. Those of a tile with few rows take less time.
constexpr int blocks_of_step(bool few_rows) { return few_rows ? 2 : 1; }

/// How the blocks of keys that a tile needs are cut: at multiples of `distance` from `origin` on, which is not behind
/// them.
struct TileCut {
  BlockRange blocks;
  int step = 1;  ///< blocks_of_step
  int origin = 0;
  int distance = 1;

  constexpr TileCut() = default;
  /// `aligned` is the distance of an aligned cut.
  constexpr TileCut(const Cut& cut, BlockRange blocks, int step, int aligned = 0)
      : blocks(blocks), step(step), origin(blocks.begin), distance(step) {
    if (cut.kind == Cut::Kind::counted && blocks.size() > 0) distance = divide(blocks.size() - 1, cut.size) + 1;
    if (cut.kind == Cut::Kind::aligned) {
      origin = 0;
      distance = aligned;
    }
  }

  /// A tile that needs no keys takes a step too, and is a grain: its rows are written.
  constexpr int steps() const { return blocks.size() == 0 ? 1 : divide(blocks.size() - 1, step) + 1; }
  constexpr int grains() const { return blocks.size() == 0 ? 1 : grains_between(blocks.begin, blocks.end - 1) + 1; }

  /// From that of one block to that of a later one.
  constexpr int grains_between(int from, int to) const {
    return divide(to - origin, distance) - divide(from - origin, distance);
  }

  /// The first block of the grain of `block`.
  constexpr int begin_of_grain(int block) const {
    const int begin = block - (block - origin) % distance;
    return begin > blocks.begin ? begin : blocks.begin;
  }

  /// The blocks of the grains that begin in steps `begin` <= s < `end` of the tile.
  constexpr BlockRange blocks_of_steps(int begin, int end) const {
    return {next_grain(blocks.begin + begin * step), next_grain(blocks.begin + end * step)};
  }

 private:
  /// Where the next grain begins, if none does at this block.
  constexpr int next_grain(int block) const {
    if (block <= blocks.begin) return blocks.begin;
    if (block >= blocks.end) return blocks.end;
    const int begin = origin + (divide(block - 1 - origin, distance) + 1) * distance;
    return begin < blocks.end ? begin : blocks.end;
  }
};

/// Steps of one worker, or of one tile.
struct Share {
  int begin = 0;
  int end = 0;
};

/// How `steps` steps are shared out among `workers` workers: each has as many as there must be for all to be taken,
/// so that the last ones may have less, or nothing. 32 bits, since this is much of what a short call takes on a GPU.
struct Shares {
  int steps = 0;
  int each = 0;

  constexpr Shares() = default;
  constexpr Shares(int steps, int workers)
      : steps(steps),
        each(static_cast<int>((static_cast<unsigned>(steps) + workers - 1U) / static_cast<unsigned>(workers))) {}

  /// Where all tiles have `of_tile` steps (else it is 0), has a worker rather take a little more than cut a tile that
  /// could be left whole, or cut tiles at other places than its neighbours: parts have to be merged. False where that
  /// is not a little more, and shares stay as they are.
  constexpr bool align(int of_tile) {
    if (of_tile == 0 || each == 0) return false;
    const auto tile = static_cast<unsigned>(of_tile);
    const auto needed = static_cast<unsigned>(each);
    const unsigned parts = needed < tile ? tile / needed : 1;
    const unsigned fitting = needed < tile ? (tile + parts - 1) / parts : (needed + tile - 1) / tile * tile;
    if (needed < tile && fitting * parts != tile) return false;
    if (fitting - needed > needed / 16) return false;
    each = static_cast<int>(fitting);
    return true;
  }

  constexpr Share of(int worker) const { return {first_of(worker), first_of(worker + 1)}; }

  /// The worker that has a step.
  constexpr int worker_of(int step) const { return divide(step, each); }

 private:
  constexpr int first_of(int worker) const {
    const unsigned first = static_cast<unsigned>(worker) * static_cast<unsigned>(each);
    return first < static_cast<unsigned>(steps) ? static_cast<int>(first) : steps;
  }
};

/// Parts of a tile's keys that one worker takes, and where the results of these and of the other parts lie until they
/// are merged. A part that is the whole has its results written at once.
struct TileParts {
  int first = 0;       ///< of this worker
  int taken = 1;       ///< by this worker
  int count = 1;       ///< of the tile
  int first_slot = 0;  ///< of part 0
  int next_slot = 0;   ///< of part 1; from there on they are `step` apart
  int step = 1;
  int counter = 0;  ///< of the parts that are done, where other workers have some: the index of the first part's worker

  constexpr int slot(int part) const { return part == 0 ? first_slot : next_slot + (part - 1) * step; }
};

/// Slots and counters that the parts of a call need, where grains are not parts of their own; else there are slots for
/// each tile.
constexpr long long slots_of(int workers) { return 2LL * workers; }
constexpr int counters_of(int workers) { return workers; }

/// The parts of a tile that a worker takes, with the blocks `taken`. Each worker shares at most the first and the last
/// of its tiles with others. Slots from `first_slot` on are the tile's, where grains are parts, else those of all
/// tiles.
constexpr TileParts parts_of(const Cut& cut, const Shares& shares, Share tile, const TileCut& tile_cut, int worker,
                             BlockRange taken, int first_slot) {
  TileParts parts;
  const int first = shares.worker_of(tile.begin);
  parts.counter = first;
  if (!cut.parts_are_grains()) {
    parts.first = worker - first;
    parts.count = shares.worker_of(tile.end - 1) - first + 1;
    parts.first_slot = first_slot + 2 * first + 1;
    parts.next_slot = first_slot + 2 * (first + 1);
    parts.step = 2;
  } else if (taken.size() > 0) {
    parts.first = tile_cut.grains_between(tile_cut.blocks.begin, taken.begin);
    parts.taken = tile_cut.grains_between(taken.begin, taken.end - 1) + 1;
    parts.count = tile_cut.grains();
    parts.first_slot = first_slot;
    parts.next_slot = first_slot + 1;
  }
  return parts;
}

/// At least as many tiles of one unit of heads as there are: where `ragged`, `rows` are those of all sequences
/// together, and only the device knows how many each has. Of each sequence there may be but `one_tile`.
constexpr long long most_tiles(const Tiling& tiling, bool one_tile, bool ragged, int rows, int batch) {
  if (one_tile) return batch;
  return ragged ? tiles_of(tiling, rows) + static_cast<long long>(batch > 0 ? batch - 1 : 0)
                : static_cast<long long>(tiles_of(tiling, rows)) * batch;
}

/// The number, below most_tiles(), of a tile of sequence b, which begins with query row `first_q` of a ragged tensor.
constexpr int tile_number(const Tiling& tiling, bool one_tile, bool ragged, int rows, int b, int first_q, int tile) {
  if (one_tile) return b;
  if (!ragged) return b * tiles_of(tiling, rows) + tile;
  return divide(first_q, divide(tiling.tile_rows, tiling.pack)) + b + tile;
}

}  // namespace mate
