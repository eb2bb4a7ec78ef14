// Shares out the keys of all tiles evenly (attention/shares.h): each block of threads finds its own share from the
// lengths of the sequences, and takes it piece by piece.
#pragma once

#include "tile_work.h"

namespace mate::cuda {

/// Counts the grains of sequences. Used by all lanes of one warp together.
template <ForwardVariant variant>
class GrainCounter : public TileFinder<variant> {
 public:
  using TileFinder<variant>::TileFinder;
  using TileFinder<variant>::a_;
  using TileFinder<variant>::problem;
  using TileFinder<variant>::units;

  __device__ static int lane() { return threadIdx.x % 32; }

  __device__ static long long warp_sum(long long x) {
    for (int distance = 16; distance > 0; distance /= 2) x += __shfl_xor_sync(~0U, x, distance);
    return x;
  }

  __device__ int distance_of(const Lengths& lengths) const {
    return a_.cut.kind == Cut::Kind::aligned ? aligned_distance(lengths, problem().group(), variant.block_keys) : 1;
  }

  __device__ int grains_of_tile(const Lengths& lengths, int tile) const {
    const BlockRange blocks = this->blocks_of_tile(lengths, this->used_rows(lengths), tile);
    return grains_of(a_.cut, blocks, distance_of(lengths));
  }

  /// Of all tiles of one unit, counted by all lanes together.
  __device__ long long grains_of_unit(const Lengths& lengths, int tiles) const {
    long long grains = 0;
    for (int tile = lane(); tile < tiles; tile += 32) grains += grains_of_tile(lengths, tile);
    return warp_sum(grains);
  }

  /// Of sequence b, another one for each lane.
  __device__ long long grains_of_sequence(int b) const {
    const int tiles = b < problem().batch ? this->tiles_of_sequence(b) : 0;
    Lengths lengths;
    if (tiles > 0) lengths = problem().sequence(b).lengths;
    long long grains = 0;
    if (tiles <= few_tiles) {
      for (int tile = 0; tile < tiles; ++tile) grains += grains_of_tile(lengths, tile);
    }
    for (unsigned long_ones = __ballot_sync(~0U, tiles > few_tiles); long_ones != 0; long_ones &= long_ones - 1) {
      const int source = __ffs(long_ones) - 1;
      const Lengths theirs{__shfl_sync(~0U, lengths.sq, source), __shfl_sync(~0U, lengths.sk, source),
                           __shfl_sync(~0U, lengths.total, source)};
      const long long sum = grains_of_unit(theirs, __shfl_sync(~0U, tiles, source));
      if (lane() == source) grains = sum;
    }
    return grains * units();
  }

 private:
  /// Tiles that a lane counts by itself; those of a longer sequence all lanes count together.
  static constexpr int few_tiles = 4;
};

/// Used by all lanes of one warp together.
template <ForwardVariant variant>
class SplitScheduler : GrainCounter<variant> {
 public:
  __device__ explicit SplitScheduler(const ForwardArguments& arguments) : GrainCounter<variant>(arguments) {
    for (int first = 0; first < problem().batch; first += 32) {
      total_ += this->warp_sum(this->grains_of_sequence(first + lane()));
    }
    share_ = share_of(total_, gridDim.x, blockIdx.x);
    enter_sequences(0, 0);
  }

  /// Writes the next piece to `work`. Returns whether there was one.
  __device__ bool next(TileWork& work) {
    const bool found = find(work);
    if (!found && lane() == 0) work.sequence = -1;
    return found;
  }

 private:
  using GrainCounter<variant>::a_;
  using GrainCounter<variant>::lane;
  using GrainCounter<variant>::problem;
  using GrainCounter<variant>::units;

  /// The sum over this lane and those before it.
  __device__ static long long warp_prefix_sum(long long x) {
    for (int distance = 1; distance < 32; distance *= 2) {
      const long long other = __shfl_up_sync(~0U, x, distance);
      if (lane() >= distance) x += other;
    }
    return x;
  }

  /// Looks at 32 sequences, the first of which begins with grain `begin`.
  __device__ void enter_sequences(int first, long long begin) {
    first_sequence_ = first;
    begin_ = begin;
    end_of_sequence_ = begin + warp_prefix_sum(this->grains_of_sequence(first + lane()));
  }

  __device__ bool find(TileWork& work) {
    if (share_.begin == share_.end) return false;
    unsigned beyond = 0;
    while ((beyond = __ballot_sync(~0U, end_of_sequence_ > share_.begin)) == 0) {
      enter_sequences(first_sequence_ + 32, __shfl_sync(~0U, end_of_sequence_, 31));
    }
    const int found = __ffs(beyond) - 1;
    const long long begin = __shfl_sync(~0U, end_of_sequence_, found == 0 ? 0 : found - 1);
    take(first_sequence_ + found, found == 0 ? begin_ : begin, work);
    return true;
  }

  /// Takes what comes next in sequence b, which begins with grain `begin`.
  __device__ void take(int b, long long begin, TileWork& work) {
    const Lengths lengths = problem().sequence(b).lengths;
    const int tiles = this->tiles_of_sequence(b);
    const long long of_unit = this->grains_of_unit(lengths, tiles);
    const long long offset = share_.begin - begin;
    const long long unit = divide(offset, of_unit);
    Share tile{begin + unit * of_unit, 0};
    const int index = find_tile(lengths, tiles, offset - unit * of_unit, tile);

    long long count = 1;
    if (!a_.cut.takes_single_grains()) count = (tile.end < share_.end ? tile.end : share_.end) - share_.begin;
    if (lane() == 0) {
      work.sequence = b;
      work.unit = static_cast<int>(unit);
      work.tile = index;
      this->locate(work);
      this->find_keys(work);
      work.part = part_of(a_.cut, total_, gridDim.x, tile, share_.begin);
      const BlockRange blocks = blocks_of_grains(a_.cut, work.blocks, this->distance_of(lengths),
                                                 static_cast<int>(share_.begin - tile.begin), static_cast<int>(count));
      work.blocks = blocks;
      if (work.whole.begin < blocks.begin) work.whole.begin = blocks.begin;
      if (work.whole.end > blocks.end) work.whole.end = blocks.end;
    }
    share_.begin += count;
  }

  /// The tile in which grain `offset` of a unit lies; the last, which has the most keys, comes first. `tile.begin` is
  /// where the unit begins; it becomes the tile's grains.
  __device__ int find_tile(const Lengths& lengths, int tiles, long long offset, Share& tile) const {
    long long before = 0;
    for (int first = 0;; first += 32) {
      const int mine = first + lane();
      const int grains = mine < tiles ? this->grains_of_tile(lengths, tiles - 1 - mine) : 0;
      const long long end = before + warp_prefix_sum(grains);
      const unsigned beyond = __ballot_sync(~0U, end > offset);
      if (beyond != 0) {
        const int found = __ffs(beyond) - 1;
        tile.end = tile.begin + __shfl_sync(~0U, end, found);
        tile.begin = tile.end - __shfl_sync(~0U, grains, found);
        return tiles - 1 - (first + found);
      }
      before = __shfl_sync(~0U, end, 31);
    }
  }

  /// GPUs divide 64 bits by long programs.
  __device__ static long long divide(long long a, long long b) {
    if ((a | b) >> 31 == 0) return static_cast<unsigned>(a) / static_cast<unsigned>(b);
    return a / b;
  }

  long long total_ = 0;
  Share share_;  ///< what is left of it
  int first_sequence_ = 0;
  long long begin_ = 0;            ///< grain with which first_sequence_ begins
  long long end_of_sequence_ = 0;  ///< grain with which this lane's sequence ends
};

}  // namespace mate::cuda
