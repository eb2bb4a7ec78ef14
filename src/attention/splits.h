// How many splits the keys of each sequence are cut into.
#pragma once

#include <cstdint>
#include <vector>

#include "plan.h"
#include "problem.h"

namespace mate {

/// Elements of the scheduler metadata of a batch: the number of splits of each sequence.
constexpr std::int64_t scheduler_metadata_elements(std::int64_t batch) { return batch; }

/// Query heads that share a tile. Packing reads each key once for all query heads of a group.
int choose_pack(const Problem& problem);

/// The number of splits, 1 .. max_splits, of each sequence, on `workers` workers.
///
/// It follows from lengths, heads and mask, and from the problem's num_splits, scheduler metadata (where num_splits is
/// 0) and batch_invariant, never from where the keys lie. Splits pay only where there are too few tiles to share out.
std::vector<int> choose_splits(const Problem& problem, const Tiling& tiling, int workers);

}  // namespace mate
