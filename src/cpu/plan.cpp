#include "plan.h"

#include <algorithm>

namespace mate {
namespace {

// Fewer key blocks than this are not worth a split of their own: merging it costs as much.
constexpr int min_blocks_per_split = 4;
// Where the batch must not matter, splits follow from a sequence's own length.
constexpr int invariant_blocks_per_split = 16;

struct SequenceWork {
  std::int64_t blocks = 0;  // of all tiles of one head unit
  int longest_tile = 0;
};

SequenceWork measure(const Problem& problem, const Tiling& tiling, int b) {
  const Lengths lengths = problem.sequence(b).lengths;
  SequenceWork work;
  for (int tile = 0; tile < tiles_of(tiling, lengths.sq); ++tile) {
    const int blocks = blocks_of_tile(tiling, problem.mask, lengths, tile).size();
    work.blocks += blocks;
    work.longest_tile = std::max(work.longest_tile, blocks);
  }
  return work;
}

int splits_for(int blocks, std::int64_t blocks_per_split) {
  return clamp(divide_up(blocks, blocks_per_split), 1, max_splits);
}

std::vector<int> choose_splits(const Problem& problem, const Plan& plan) {
  std::vector<int> splits(problem.batch, 1);
  if (problem.batch_invariant) {
    for (int b = 0; b < problem.batch; ++b) {
      splits[b] = splits_for(measure(problem, plan.tiling, b).longest_tile, invariant_blocks_per_split);
    }
  } else if (problem.num_splits > 0) {
    std::fill(splits.begin(), splits.end(), problem.num_splits);
  } else if (problem.scheduler_metadata.given()) {
    for (int b = 0; b < problem.batch; ++b) splits[b] = clamp(problem.scheduler_metadata[b], 1, max_splits);
  } else if (plan.workers > 1) {
    std::vector<SequenceWork> work(problem.batch);
    std::int64_t blocks = 0;
    for (int b = 0; b < problem.batch; ++b) {
      work[b] = measure(problem, plan.tiling, b);
      blocks += work[b].blocks * (plan.streams(problem.sequence(b).lengths) ? 1 : plan.head_units(problem));
    }
    const std::int64_t blocks_per_split =
        std::max<std::int64_t>(min_blocks_per_split, divide_up(blocks, std::int64_t{plan.workers} * pieces_per_worker));
    for (int b = 0; b < problem.batch; ++b) splits[b] = splits_for(work[b].longest_tile, blocks_per_split);
  }
  return splits;
}

/// Rows of a tile: many read a packed key often, few leave enough tiles for all workers.
int choose_tile_rows(const Problem& problem, const Plan& plan, const Machine& machine) {
  std::int64_t least_tiles = 0;
  for (int b = 0; b < problem.batch; ++b) {
    const std::int64_t rows = std::int64_t{problem.sequence(b).lengths.sq} * plan.tiling.pack;
    least_tiles += divide_up(rows, machine.min_tile_rows) * plan.head_units(problem);
  }
  const std::int64_t wanted = std::int64_t{plan.workers} * pieces_per_worker;
  return clamp(least_tiles / wanted, 1, machine.max_tile_rows / machine.min_tile_rows) * machine.min_tile_rows;
}

}  // namespace

Plan make_plan(const Problem& problem, const Machine& machine) {
  Plan plan;
  plan.workers = std::max(1, machine.workers - problem.sm_margin);
  plan.streamed_rows = machine.streamed_rows;
  plan.tiling = {machine.max_tile_rows, machine.block_keys, problem.pack_gqa == 0 ? 1 : std::max(1, problem.group())};
  if (!problem.batch_invariant) plan.tiling.tile_rows = choose_tile_rows(problem, plan, machine);
  plan.splits = choose_splits(problem, plan);
  return plan;
}

}  // namespace mate
