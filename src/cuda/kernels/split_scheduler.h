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

  __device__ static int warp_sum(int x) { return __reduce_add_sync(~0U, x); }

  __device__ int distance_of(const Lengths& lengths) const {
    return a_.cut.kind == Cut::Kind::aligned ? aligned_distance(lengths, problem().group(), variant.block_keys) : 1;
  }

  __device__ int grains_of_tile(const Lengths& lengths, int tile) const {
    const BlockRange blocks = this->blocks_of_tile(lengths, this->used_rows(lengths), tile);
    return grains_of(a_.cut, blocks, distance_of(lengths));
  }

  /// What there is to do for a sequence.
  struct Count {
    int tiles = 0;   ///< of one unit
    int grains = 0;  ///< of them all
    Lengths lengths;
  };

  /// Of sequence b, another one for each lane.
  __device__ Count count(int b) const {
    Count count;
    if (b < problem().batch) {
      count.tiles = this->tiles_of_sequence(b);
      count.lengths = problem().sequence(b).lengths;
      if (count.tiles <= few_tiles) {
#pragma unroll 1
        for (int tile = 0; tile < count.tiles; ++tile) count.grains += grains_of_tile(count.lengths, tile);
      }
    }
#pragma unroll 1
    for (unsigned long_ones = __ballot_sync(~0U, count.tiles > few_tiles); long_ones != 0; long_ones &= long_ones - 1) {
      const int source = __ffs(long_ones) - 1;
      const Count theirs = from(count, source);
      int grains = 0;
#pragma unroll 1
      for (int tile = lane(); tile < theirs.tiles; tile += 32) grains += grains_of_tile(theirs.lengths, tile);
      grains = warp_sum(grains);
      if (lane() == source) count.grains = grains;
    }
    return count;
  }

 protected:
  __device__ static Count from(const Count& count, int source) {
    return {__shfl_sync(~0U, count.tiles, source),
            __shfl_sync(~0U, count.grains, source),
            {__shfl_sync(~0U, count.lengths.sq, source), __shfl_sync(~0U, count.lengths.sk, source),
             __shfl_sync(~0U, count.lengths.total, source)}};
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
    // The last sequences are counted first, so that those it begins with need not be counted twice.
    int grains = 0;
#pragma unroll 1
    for (int first = (problem().batch - 1) / 32 * 32; first >= 0; first -= 32) {
      count_ = this->count(first + lane());
      grains += this->warp_sum(count_.grains * units());
    }
    shares_ = Shares(grains, gridDim.x);
    share_ = shares_.of(blockIdx.x);
    end_of_sequence_ = warp_prefix_sum(count_.grains * units());
  }

  /// Writes the next piece to `work`. Returns whether there was one.
  __device__ bool next(TileWork& work) {
    const bool any = share_.begin < share_.end;
    if (any) {
      find(work);
    } else if (lane() == 0) {
      work.sequence = -1;
    }
    return any;
  }

 private:
  using Count = typename GrainCounter<variant>::Count;
  using GrainCounter<variant>::a_;
  using GrainCounter<variant>::lane;
  using GrainCounter<variant>::problem;
  using GrainCounter<variant>::units;

  /// The sum over this lane and those before it.
  __device__ static int warp_prefix_sum(int x) {
#pragma unroll
    for (int distance = 1; distance < 32; distance *= 2) {
      const int other = __shfl_up_sync(~0U, x, distance);
      if (lane() >= distance) x += other;
    }
    return x;
  }

  __device__ void find(TileWork& work) {
    unsigned beyond = 0;
#pragma unroll 1
    while ((beyond = __ballot_sync(~0U, end_of_sequence_ > share_.begin)) == 0) {
      const int end = __shfl_sync(~0U, end_of_sequence_, 31);
      first_sequence_ += 32;
      count_ = this->count(first_sequence_ + lane());
      end_of_sequence_ = end + warp_prefix_sum(count_.grains * units());
    }
    const int found = __ffs(beyond) - 1;
    const Count count = this->from(count_, found);
    const int begin = __shfl_sync(~0U, end_of_sequence_, found) - count.grains * units();
    const int unit =
        static_cast<int>(static_cast<unsigned>(share_.begin - begin) / static_cast<unsigned>(count.grains));
    Share tile{begin + unit * count.grains, begin + (unit + 1) * count.grains};
    const int index = count.tiles == 1 ? 0 : find_tile(count, tile);
    const int room = tile.end - share_.begin;
    const int left = share_.end - share_.begin;
    const int taken = a_.cut.takes_single_grains() ? 1 : room < left ? room : left;
    if (lane() == 0) {
      work.sequence = first_sequence_ + found;
      work.unit = unit;
      work.tile = index;
      this->locate(work);
    }
    this->find_keys(work);
    if (lane() == 0) {
      if (room != taken || tile.begin != share_.begin) work.part = part_of(a_.cut, shares_, tile, share_.begin);
      const BlockRange blocks =
          blocks_of_grains(a_.cut, work.blocks, this->distance_of(count.lengths), share_.begin - tile.begin, taken);
      work.blocks = blocks;
      if (work.whole.begin < blocks.begin) work.whole.begin = blocks.begin;
      if (work.whole.end > blocks.end) work.whole.end = blocks.end;
    }
    share_.begin += taken;
  }

  /// The tile of the unit with the grains `unit` in which the next grain lies; the last tile, which has the most keys,
  /// comes first. `unit` becomes the tile's grains.
  __device__ int find_tile(const Count& count, Share& unit) const {
    int begin = unit.begin;
#pragma unroll 1
    for (int first = 0;; first += 32) {
      const int tile = count.tiles - 1 - (first + lane());
      const int grains = tile >= 0 ? this->grains_of_tile(count.lengths, tile) : 0;
      const int end = begin + warp_prefix_sum(grains);
      const unsigned beyond = __ballot_sync(~0U, end > share_.begin);
      if (beyond != 0) {
        const int found = __ffs(beyond) - 1;
        unit.end = __shfl_sync(~0U, end, found);
        unit.begin = unit.end - __shfl_sync(~0U, grains, found);
        return count.tiles - 1 - (first + found);
      }
      begin = __shfl_sync(~0U, end, 31);
    }
  }

  Shares shares_;
  Share share_;  ///< what is left of this block's
  int first_sequence_ = 0;
  Count count_;              ///< of this lane's sequence, among the 32 from first_sequence_ on
  int end_of_sequence_ = 0;  ///< grain with which it ends
};

}  // namespace mate::cuda
