// What a block of threads works on next, and which keys it needs.
#pragma once

#include "attention/shares.h"
#include "forward_arguments.h"
#include "forward_variant.h"
#include "ptx/cluster.h"

namespace mate::cuda {

/// A tile of query rows and the keys it needs.
struct TileWork {
  int sequence = -1;  ///< of the batch; negative: there are no more tiles
  int unit = 0;       ///< `pack` query heads
  int head_k = 0;     ///< their key head
  int tile = 0;
  int first_query = 0;  ///< query row of the sequence that the tile, or this block's part of it, begins with
  int used = 0;         ///< query rows that are computed; the sequence's others are cleared
  Sequence place;
  KeyRange seen;         ///< keys that some row of the sequence sees
  KeyRange seen_by_all;  ///< keys that every row of the tile sees
  BlockRange blocks;     ///< of keys that some row of the tile sees, and that are this block's part of them
  BlockRange whole;      ///< those of them that every row of the tile sees whole

  // Where keys are shared out.
  Shares shares;
  Share steps;      ///< of the tile
  TileCut cut;      ///< of all its blocks
  TileParts parts;  ///< that this block of threads takes, one after another: found by the loader, or, where a cluster
                    ///< merges them, by the scheduler

  /// The first block of the part that a block of keys belongs to.
  __device__ int begin_of_part(const Cut& of_call, int n) const {
    return of_call.parts_are_grains() ? cut.begin_of_grain(n) : blocks.begin;
  }
  /// The part that begins with a block.
  __device__ int part_at(const Cut& of_call, int n) const {
    return parts.first + (of_call.parts_are_grains() ? cut.grains_between(blocks.begin, n) : 0);
  }
};

/// Whose steps a block of threads takes. Where each sequence has several tiles that see much the same keys, as many
/// blocks of threads, a team, take such tiles at the same time, so that the L2 cache has the keys for all but one: the
/// tiles of each member, which are those with its number modulo the team's size, are a row of steps of their own, and
/// members with the same number share it out among them. The blocks of a cluster take the same steps, of other heads.
struct Worker {
  int team = 1;
  int member = 0;
  int number = 0;       ///< among workers
  int workers = 1;      ///< of the same member's steps
  int first_index = 0;  ///< the index of the first of those that have parts of the same tiles

  /// Among all blocks of threads.
  __device__ int index() const { return first_index + number; }
  /// Of `tiles` tiles, how many are this member's.
  __device__ int tiles_of(int tiles) const {
    return team == 1 ? tiles : tiles > member ? divide(tiles - member - 1, team) + 1 : 0;
  }
  /// The tile that is number i of these.
  __device__ int tile(int i) const { return member + i * team; }
};

template <ForwardVariant variant>
__device__ Worker this_worker(const ForwardArguments& a) {
  constexpr int cluster = variant.unit_blocks();
  const int number = divide(static_cast<int>(blockIdx.x), cluster);
  Worker worker;
  worker.number = number;
  worker.workers = divide(static_cast<int>(gridDim.x), cluster);
  if constexpr (!variant.one_tile()) {
    if (a.team > 1) {
      worker.team = a.team;
      worker.number = divide(number, a.team);
      worker.workers = divide(worker.workers, a.team);
      worker.member = number - worker.number * a.team;
    }
  }
  int row_of_steps = worker.member;
  if constexpr (cluster > 1) row_of_steps = row_of_steps * cluster + ptx::block_of_cluster();
  worker.first_index = row_of_steps * worker.workers;
  return worker;
}

/// Finds the keys of tiles.
template <ForwardVariant variant>
class TileFinder {
 public:
  __device__ explicit TileFinder(const ForwardArguments& arguments) : a_(arguments) {}

  __device__ const Problem& problem() const { return a_.problem; }
  /// What is computed from it is not worth registers from tile to tile.
  __device__ Tiling tiling() const {
    return {ptx::known_only_here(a_.rows_of_block) * variant.row_blocks(), variant.block_keys,
            ptx::known_only_here(a_.pack)};
  }
  /// Of heads, or where the blocks of a cluster have one each, of so many of them.
  __device__ int units() const { return divide(a_.units, variant.unit_blocks()); }
  /// This block's unit of these.
  __device__ int unit_of_block(int unit) const {
    if constexpr (variant.unit_blocks() > 1) return unit * variant.unit_blocks() + ptx::block_of_cluster();
    return unit;
  }

  /// Of one unit.
  __device__ int tiles_of_capacity(int rows) const {
    if (variant.one_tile() || rows <= 0) return rows > 0;
    // More than an int holds, where a ragged sequence is longer than max_seqlen_q said.
    const unsigned packed_rows = static_cast<unsigned>(rows) * static_cast<unsigned>(a_.pack);
    return static_cast<int>((packed_rows - 1) / static_cast<unsigned>(a_.rows_of_block * variant.row_blocks())) + 1;
  }

  __device__ int used_rows(const Lengths& lengths) const {
    return lengths.sq < problem().max_seqlen_q ? lengths.sq : problem().max_seqlen_q;
  }

  /// The blocks of keys that some row of a tile of a sequence sees.
  __device__ BlockRange blocks_of_tile(const Lengths& lengths, int used, int tile) const {
    const TileRows rows = rows_of_tile(tiling(), used, tile);
    if (rows.count() <= 0) return {};
    return blocks_of_keys(tiling(),
                          keys_of_some_row(problem().mask, lengths, query_of_row(rows.first), query_of_row(rows.last)));
  }

  /// Where the rows of a sequence are. One lane does that.
  __device__ void locate(TileWork& work) const {
    work.place = problem().sequence(work.sequence);
    work.used = used_rows(work.place.lengths);
  }

  /// The keys of a tile that is located: found by all lanes of a warp together, one row's for each.
  __device__ void find_keys(TileWork& work) const {
    __syncwarp();
    const int used = work.used;
    const TileRows rows = rows_of_tile(tiling(), used, work.tile);
    const int first_query = query_of_row(rows.first);
    const int last_query = rows.count() > 0 ? query_of_row(rows.last) : 0;
    const int lane = threadIdx.x % 32;
    const int row = lane == 0 ? first_query : lane == 1 ? last_query : lane == 2 ? 0 : used - 1;
    const KeyRange seen = visible_keys(problem().mask, work.place.lengths, row);
    const KeyRange first{__shfl_sync(~0U, seen.begin, 0), __shfl_sync(~0U, seen.end, 0)};
    const KeyRange last{__shfl_sync(~0U, seen.begin, 1), __shfl_sync(~0U, seen.end, 1)};
    const KeyRange of_sequence{__shfl_sync(~0U, seen.begin, 2), __shfl_sync(~0U, seen.end, 3)};
    if (lane > 0) return;
    set_keys(work, rows.count() > 0, first, last, of_sequence);
    work.first_query = first_query;
    if constexpr (variant.row_blocks() > 1) {
      work.first_query += ptx::block_of_cluster() * divide(a_.rows_of_block, a_.pack);
    }
  }

  /// The keys of a tile, from what its first and last row see and what rows of its sequence do, if `any` of its rows
  /// are computed. One lane does that.
  __device__ void set_keys(TileWork& work, bool any, KeyRange first, KeyRange last, KeyRange of_sequence) const {
    const KeyRange seen_by_all = any ? keys_of_every_row(first, last) : KeyRange{};
    work.head_k = divide(work.unit, a_.units_of_key_head);
    work.seen = any ? of_sequence : KeyRange{};
    work.seen_by_all = seen_by_all;
    work.blocks = blocks_of_keys(tiling(), any ? keys_of_some_row(first, last) : KeyRange{});
    work.whole = {(seen_by_all.begin + variant.block_keys - 1) / variant.block_keys,
                  seen_by_all.end / variant.block_keys};
  }

 protected:
  /// The query that a packed row belongs to. The host sees to it that packed rows are counted in 32 bits: GPUs divide
  /// 64 by long programs.
  __device__ int query_of_row(long long row) const {
    return static_cast<int>(static_cast<unsigned>(row) / static_cast<unsigned>(a_.pack));
  }

  const ForwardArguments& a_;
};

}  // namespace mate::cuda
