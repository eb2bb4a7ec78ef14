// A launch that merges the parts of tiles which another launch before it has cut, where it would take a multiprocessor
// long to merge all those of a tile.
#pragma once

#include "part_merger.h"
#include "ptx/launch.h"

namespace mate::cuda {

/// Blocks of merge_threads, each warp of which merges some rows: grid.x is that of the launch before, grid.y blocks
/// share out the rows of a tile.
template <ElementType out_type>
__device__ inline void merge_parts(const ForwardArguments& a) {
  ptx::begin_overlapped();
  const CutTile& tile = a.parts.cut_tiles[blockIdx.x];
  TileWork work;
  work.parts.count = __ldcg(&tile.parts.count);
  if (work.parts.count == 0) return;
  work.sequence = __ldcg(&tile.sequence);
  work.unit = __ldcg(&tile.unit);
  work.first_query = __ldcg(&tile.first_query);
  work.used = __ldcg(&tile.used);
  work.place.first_q = __ldcg(&tile.first_q);
  work.place.query_capacity = __ldcg(&tile.query_capacity);
  work.parts.first_slot = __ldcg(&tile.parts.first_slot);
  work.parts.next_slot = __ldcg(&tile.parts.next_slot);
  work.parts.step = __ldcg(&tile.parts.step);
  const float value_factor = __ldcg(&tile.value_factor);
  constexpr int warps = merge_threads / 32;
  const int all_warps = static_cast<int>(gridDim.y) * warps;
#pragma unroll 1
  for (int row = static_cast<int>(blockIdx.y) * warps + static_cast<int>(threadIdx.x / 32); row < a.rows_of_block;
       row += all_warps) {
    PartMerger<out_type>(a).template merge_row_of<most_at_once>(work, row, value_factor);
  }
}

}  // namespace mate::cuda
