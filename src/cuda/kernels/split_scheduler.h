// Shares out the keys of all tiles evenly (attention/shares.h): each block of threads finds its own share from the
// lengths of the sequences, and takes it piece by piece.
#pragma once

#include "side_by_side.h"
#include "tile_work.h"
#include "warp.h"

namespace mate::cuda {

/// Counts the steps of sequences. Used by all lanes of one warp together.
template <ForwardVariant variant>
class StepCounter : public TileFinder<variant> {
 public:
  __device__ explicit StepCounter(const ForwardArguments& arguments, const Worker& worker = {})
      : TileFinder<variant>(arguments), worker_(worker) {}

  using TileFinder<variant>::a_;
  using TileFinder<variant>::problem;
  using TileFinder<variant>::units;

  __device__ static int lane() { return threadIdx.x % 32; }

  /// Of a tile of a sequence with so many rows of out.
  __device__ int blocks_of_step(int capacity, int tile) const {
    if constexpr (variant.row_groups() == 1) return mate::blocks_of_step(false);
    // Half a tile is one consumer's: the others skip it.
    return mate::blocks_of_step((capacity * a_.pack - tile * a_.rows_of_block) * 2 <= variant.tile_rows());
  }

  /// Of a tile that needs these blocks of keys.
  __device__ int steps_of(const Sequence& place, int tile, BlockRange blocks) const {
    return TileCut({}, blocks, blocks_of_step(place.query_capacity, tile)).steps();
  }

  __device__ TileCut cut_of(const Sequence& place, int tile, BlockRange blocks) const {
    int aligned = 0;
    if (a_.cut.kind == Cut::Kind::aligned) {
      const Problem& p = problem();
      aligned =
          AlignedCut(place.lengths, {p.group(), p.heads_k, p.head_dim, p.head_dim_v, variant.block_keys}).distance();
    }
    return {a_.cut, blocks, blocks_of_step(place.query_capacity, tile), aligned};
  }

  __device__ int steps_of_tile(const Sequence& place, int tile) const {
    return steps_of(place, tile, this->blocks_of_tile(place.lengths, this->used_rows(place.lengths), tile));
  }

  /// What there is to do for a sequence.
  struct Count {
    int tiles = 0;  ///< of one unit, and of this worker's steps
    int steps = 0;  ///< of them all
    Sequence place;
    KeyRange first, last;  ///< keys that its first and last row see, where they are in one tile
  };

  /// Of sequence b, another one for each lane.
  __device__ Count count(int b) const {
    Count count;
    if (b < problem().batch) {
      count.place = problem().sequence(b);
      if (serves(a_, count.place.lengths.sq)) {
        count.tiles = worker_.tiles_of(this->tiles_of_capacity(count.place.query_capacity));
      }
    }
    if constexpr (variant.one_tile()) {
      if (count.tiles > 0) count_tile(count);
    } else {
      count_tiles(count);
    }
    return count;
  }

 protected:
  /// What a lane has found.
  __device__ static Count from(const Count& count, int source) {
    const auto of = [&](int x) { return __shfl_sync(~0U, x, source); };
    Count theirs;
    theirs.tiles = of(count.tiles);
    theirs.steps = of(count.steps);
    theirs.place.lengths = {of(count.place.lengths.sq), of(count.place.lengths.sk), of(count.place.lengths.total)};
    theirs.place.query_capacity = of(count.place.query_capacity);
    theirs.place.first_q = of(count.place.first_q);
    theirs.place.cache_row = of(count.place.cache_row);
    theirs.place.first_k = of(count.place.first_k);
    if constexpr (variant.one_tile()) {
      theirs.first = {of(count.first.begin), of(count.first.end)};
      theirs.last = {of(count.last.begin), of(count.last.end)};
    }
    return theirs;
  }

  Worker worker_;

 private:
  /// Tiles that a lane counts by itself; those of a longer sequence all lanes count together.
  static constexpr int few_tiles = 4;

  __device__ void count_tile(Count& count) const {
    const Lengths& lengths = count.place.lengths;
    const int used = this->used_rows(lengths);
    BlockRange blocks{};
    if (used > 0) {
#pragma unroll 1
      for (int row = used - 1;; row = 0) {
        count.first = visible_keys(problem().mask, lengths, row);
        if (row == used - 1) count.last = count.first;
        if (row == 0) break;
      }
      blocks = blocks_of_keys(this->tiling(), keys_of_some_row(count.first, count.last));
    }
    count.steps = steps_of(count.place, 0, blocks);
  }

  __device__ void count_tiles(Count& count) const {
    if (count.tiles <= few_tiles) {
#pragma unroll 1
      for (int i = 0; i < count.tiles; ++i) count.steps += steps_of_tile(count.place, worker_.tile(i));
    }
#pragma unroll 1
    for (unsigned long_ones = __ballot_sync(~0U, count.tiles > few_tiles); long_ones != 0; long_ones &= long_ones - 1) {
      const int source = __ffs(long_ones) - 1;
      const Count theirs = from(count, source);
      int steps = 0;
#pragma unroll 1
      for (int i = lane(); i < theirs.tiles; i += 32) steps += steps_of_tile(theirs.place, worker_.tile(i));
      steps = warp_sum(steps);
      if (lane() == source) count.steps = steps;
    }
  }
};

/// How many steps tiles take.
struct StepsOfTiles {
  int all = 0;
  int fewest = max_length;  ///< of a tile
  int most = 0;             ///< of a tile; where a sequence has several tiles, 0: they are not alike

  template <typename Count>
  __device__ void add(const Count& of_sequence) {
    all += of_sequence.steps;
    const int of_tile = of_sequence.tiles <= 1 ? of_sequence.steps : 0;
    if (of_sequence.tiles > 0 && of_tile < fewest) fewest = of_tile;
    if (of_tile > most) most = of_tile;
  }
  /// Of all lanes together.
  __device__ StepsOfTiles reduced() const {
    return {__reduce_add_sync(~0U, all), __reduce_min_sync(~0U, fewest), __reduce_max_sync(~0U, most)};
  }
};

/// What the warps of a block of threads have counted together, since a batch is more than a warp has lanes for.
struct BatchSteps {
  static constexpr int most_warps = 20;
  static constexpr int chunks = 32;  // one for each lane that reads them
  StepsOfTiles of_warp[most_warps];
  int of_chunk[chunks];  ///< all steps of every 32 sequences; beyond so many chunks they are not kept
};

/// Whether warps count together.
__device__ inline bool counts_together(const Problem& problem) { return problem.batch > 32; }

/// Used by all threads of a block of threads together, which may read lengths by now.
template <ForwardVariant variant>
__device__ void count_together(const ForwardArguments& a, BatchSteps& steps) {
  constexpr int warps = variant.threads() / 32;
  static_assert(warps <= BatchSteps::most_warps);
  const StepCounter<variant> counter(a, this_worker<variant>(a));
  const int warp = static_cast<int>(threadIdx.x / 32);
  const int lane = static_cast<int>(threadIdx.x % 32);
  StepsOfTiles mine;
#pragma unroll 1
  for (int chunk = warp; chunk * 32 < a.problem.batch; chunk += warps) {
    const auto count = counter.count(32 * chunk + lane);
    mine.add(count);
    const int all = warp_sum(count.steps);
    if (lane == 0 && chunk < BatchSteps::chunks) steps.of_chunk[chunk] = all;
  }
  mine = mine.reduced();
  if (lane == 0) steps.of_warp[warp] = mine;
  if constexpr (!variant.gather) ptx::fence_proxy_async();  // the copy engine will write there
}

/// Used by all lanes of one warp together.
template <ForwardVariant variant>
class SplitScheduler : StepCounter<variant> {
 public:
  __device__ explicit SplitScheduler(const ForwardArguments& arguments)
      : StepCounter<variant>(arguments, this_worker<variant>(arguments)) {}

  /// Whether a small batch's share may be found while earlier kernels run.
  __device__ bool may_begin_early() const { return !counts_together(problem()); }

  /// Finds this block's share: before all else. `counted` is of a batch that warps have counted together.
  __device__ void begin(const BatchSteps& counted) {
    unit_ = 0;
    first_sequence_ = 0;
    end_of_sequence_ = 0;
    StepsOfTiles steps;
    if (counts_together(problem())) {
      if (lane() < variant.threads() / 32) steps = counted.of_warp[lane()];
    } else {
      count_ = this->count(sequence_of_lane());
      steps.add(count_);
    }
    steps = steps.reduced();
    steps_of_unit_ = steps.all;
    const int workers = workers_of_launch(a_, worker_.workers);
    shares_ = Shares(steps_of_unit_ * units(), workers);
    const bool aligned = shares_.align(steps.fewest == steps.most ? steps.fewest : 0);
    if constexpr (variant.one_tile()) {
      if (!aligned) round_up_steps(workers);
    }
    share_ = shares_.of(worker_.number);
    if (share_.begin < share_.end) {
      unit_ = divide(share_.begin, steps_of_unit_);
      seek(counted, share_.begin - unit_ * steps_of_unit_);
    }
  }

  /// Whether what was read of the sequences, which this warp has counted alone, is what memory says now.
  __device__ bool still_holds(const TileWork&) const {
    bool same = true;
    if (const int b = sequence_of_lane(); b < problem().batch) {
      same = is_same_place(problem().sequence(b), count_.place);
    }
    return __all_sync(~0U, same);
  }

  /// Writes the next piece to `work`. Returns whether there was one.
  __device__ bool next(TileWork& work) {
    while (share_.begin < share_.end) {
      if (find(work)) return true;
    }
    if (lane() == 0) work.sequence = -1;
    return false;
  }

 private:
  using Count = typename StepCounter<variant>::Count;
  using StepCounter<variant>::a_;
  using StepCounter<variant>::lane;
  using StepCounter<variant>::problem;
  using StepCounter<variant>::units;
  using StepCounter<variant>::worker_;

  /// Where each worker may have a part of one tile alone, which is hardly more than an even share, rounds the steps of
  /// tiles up to a multiple of a part's, the last of which are of no blocks then: each further piece of work takes a
  /// worker as long as some steps. Short, since all other calls wait for the code behind it.
  __device__ void round_up_steps(int workers) {
    constexpr int most_added = 4;
    constexpr int longest = 1024;  // of parts that are worth it, and that floats count exactly
    const int even = shares_.each;
    const bool may_be = !counts_together(problem()) && problem().batch * units() <= workers;
    if (!may_be || a_.cut.kind != Cut::Kind::even || even == 0 || even > longest) return;
#pragma unroll 1
    for (int each = even; each <= even + min(even / 2 + 1, most_added); ++each) {
      const int parts =
          static_cast<int>(__fdividef(static_cast<float>(count_.steps + each) - 0.5F, static_cast<float>(each)));
      const int all_parts = __reduce_add_sync(~0U, parts);
      if (all_parts * units() > workers) continue;
      count_.steps = parts * each;
      steps_of_unit_ = all_parts * each;
      shares_.steps = steps_of_unit_ * units();
      shares_.each = each;
      return;
    }
  }

  /// Of the first ones. Where its lengths lie is not worth registers from tile to tile.
  __device__ static int sequence_of_lane() { return ptx::known_only_here(lane()); }

  /// Goes to the chunk of 32 sequences in which a step of the unit lies, or to the first that is not kept.
  __device__ void seek(const BatchSteps& counted, int step) {
    end_of_sequence_ = unit_ * steps_of_unit_;
    if (!counts_together(problem())) {
      end_of_sequence_ += warp_prefix_sum(count_.steps);
      return;
    }
    // To the end of the chunk before, from which find() goes on.
    const int end = warp_prefix_sum(32 * lane() < problem().batch ? counted.of_chunk[lane()] : 0);
    const unsigned beyond = __ballot_sync(~0U, end > step);
    const int chunk = beyond != 0 ? __ffs(beyond) - 1 : BatchSteps::chunks;
    const int before = __shfl_sync(~0U, end, chunk - 1);
    first_sequence_ = 32 * (chunk - 1);
    if (chunk > 0) end_of_sequence_ += before;
  }

  /// Goes past the steps of a tile. Returns whether there is something to do in them.
  __device__ bool find(TileWork& work) {
    unsigned beyond = 0;
#pragma unroll 1
    while ((beyond = __ballot_sync(~0U, end_of_sequence_ > share_.begin)) == 0) {
      const int begin = __shfl_sync(~0U, end_of_sequence_, 31);
      first_sequence_ += 32;
      if (first_sequence_ >= problem().batch) {
        first_sequence_ = 0;
        ++unit_;
      }
      if (counts_together(problem())) count_ = this->count(first_sequence_ + lane());
      end_of_sequence_ = begin + warp_prefix_sum(count_.steps);
    }
    const int found = __ffs(beyond) - 1;
    const Count count = this->from(count_, found);
    Share of_sequence;
    of_sequence.end = __shfl_sync(~0U, end_of_sequence_, found);
    of_sequence.begin = of_sequence.end - count.steps;
    const auto [index, tile] = find_tile(count, of_sequence);
    const Share taken{share_.begin, tile.end < share_.end ? tile.end : share_.end};
    if (lane() == 0) {
      work.sequence = first_sequence_ + found;
      work.unit = this->unit_of_block(unit_);
      work.tile = index;
      work.place = count.place;
      work.used = this->used_rows(count.place.lengths);
      work.shares = shares_;
      work.steps = tile;
      if constexpr (variant.one_tile()) {
        work.first_query = 0;
        this->set_keys(work, work.used > 0, count.first, count.last, {count.first.begin, count.last.end});
      }
    }
    if constexpr (!variant.one_tile()) this->find_keys(work);
    bool any = true;
    if (lane() == 0) {
      const TileCut cut = this->cut_of(count.place, index, work.blocks);
      const BlockRange blocks = cut.blocks_of_steps(taken.begin - tile.begin, taken.end - tile.begin);
      // One without keys is whoever has its step.
      any = blocks.size() > 0 || cut.blocks.size() == 0;
      work.cut = cut;
      work.blocks = blocks;
      if (work.whole.begin < blocks.begin) work.whole.begin = blocks.begin;
      if (work.whole.end > blocks.end) work.whole.end = blocks.end;
    }
    share_.begin = taken.end;
    return !a_.cut.parts_are_grains() || __shfl_sync(~0U, static_cast<int>(any), 0) != 0;
  }

  struct Tile {
    int index;
    Share steps;
  };

  /// The tile of a sequence, which has the steps `of_sequence` in this unit, in which the next step lies. The last
  /// tile, which has the most keys, comes first.
  __device__ Tile find_tile(const Count& count, Share of_sequence) const {
    if constexpr (variant.one_tile()) return {0, of_sequence};
    if (count.tiles == 1) return {worker_.tile(0), of_sequence};
    int begin = of_sequence.begin;
#pragma unroll 1
    for (int first = 0;; first += 32) {
      const int i = count.tiles - 1 - (first + lane());
      const int steps = i >= 0 ? this->steps_of_tile(count.place, worker_.tile(i)) : 0;
      const int end = begin + warp_prefix_sum(steps);
      const unsigned beyond = __ballot_sync(~0U, end > share_.begin);
      if (beyond != 0) {
        const int found = __ffs(beyond) - 1;
        const int end_of_tile = __shfl_sync(~0U, end, found);
        return {worker_.tile(count.tiles - 1 - (first + found)),
                {end_of_tile - __shfl_sync(~0U, steps, found), end_of_tile}};
      }
      begin = __shfl_sync(~0U, end, 31);
    }
  }

  Shares shares_;
  Share share_;  ///< what is left of this block's
  // Steps are counted unit by unit, so that heads of one sequence, whose rows are neighbours in memory, are read by
  // several blocks of threads at the same time rather than by one of them one after another.
  int steps_of_unit_;
  int unit_;
  int first_sequence_;
  Count count_;          ///< of this lane's sequence, among the 32 from first_sequence_ on
  int end_of_sequence_;  ///< step with which it ends
};

}  // namespace mate::cuda
