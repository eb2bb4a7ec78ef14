// The plan of a call on the CPU: how its work is cut up.
#pragma once

#include <cstdint>
#include <vector>

#include "attention/problem.h"
#include "attention/tiling.h"

namespace mate {

/// With so many pieces of work a worker, taken as workers become free, the last one to finish is not late by much.
inline constexpr int pieces_per_worker = 4;

/// What the processor, and the kernels for it, ask for.
struct Machine {
  int min_tile_rows = 0;  ///< query rows of a tile, where the work is to be shared by all workers,
  int max_tile_rows = 0;  ///< and where there is more than enough of it: a multiple of the least
  int block_keys = 0;     ///< keys of a block
  /// Sequences of at most so many packed rows read their keys as a stream: one worker takes all head units together.
  int streamed_rows = 0;
  int workers = 1;  ///< threads, before sm_margin
};

/// How a call's work is cut up. It follows from lengths, heads, mask and options, never from where the keys lie.
struct Plan {
  Tiling tiling;
  std::vector<int> splits;  ///< of the keys of each sequence: 1 .. max_splits
  int streamed_rows = 0;
  int workers = 1;

  /// Whether the keys of a sequence are read as a stream.
  bool streams(const Lengths& lengths) const { return std::int64_t{lengths.sq} * tiling.pack <= streamed_rows; }

  /// Groups of tiling.pack query heads, each with tiles of its own.
  int head_units(const Problem& problem) const { return problem.heads_q / tiling.pack; }
};

/// Query heads of a group share tiles, and so each read of a key, unless the call forbids it. The number of splits is
/// the one that the call asks for; else what its scheduler metadata says; else what shares the work out evenly. With
/// batch_invariant it follows from a sequence's own lengths alone.
Plan make_plan(const Problem& problem, const Machine& machine);

}  // namespace mate
