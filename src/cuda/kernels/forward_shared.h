// What a block of threads of the forward kernel keeps in shared memory.
#pragma once

#include "ring.h"
#include "split_scheduler.h"
#include "tile_rows.h"
#include "tile_scales.h"
#include "tile_work.h"

namespace mate::cuda {

template <int bytes>
struct alignas(1024) TileBuffer {
  unsigned char rows[bytes];
};

/// What consumers of the same rows exchange: nothing, where there are none.
template <ForwardVariant variant, bool needed = variant.wide>
struct SharedWeights {};

template <ForwardVariant variant>
struct SharedWeights<variant, true> {
  TileBuffer<variant.p_tile_bytes()> tiles[variant.p_tiles()];
};

/// What the consumers of transposed.h tell each other of a tile's rows.
template <ForwardVariant variant, bool needed = variant.transposed()>
struct SharedRows {
  __device__ void init() {}
};

template <ForwardVariant variant>
struct SharedRows<variant, true> {
  static constexpr int rows = variant.tile_rows();
  alignas(16) RowTarget targets[rows];
  alignas(8) float query_factor[rows];  ///< what queries were divided by, to fit float16
  KeyRange visible[rows];
  alignas(8) float largest[2][variant.scorers()][4][rows];  ///< of the scores of a block, by each warp of scorers
  /// Of each warp of scorers: subtrahends of exponents, and what a scorer's own sums are to be multiplied by.
  alignas(16) float2 relative[4 * variant.scorers()][rows];
  // Of the weights of a block: what they are relative to, what sums are to be multiplied by before they are added, and,
  // with the last block of a scorer in a part, the sums of its weights, by each warp.
  alignas(8) float references[variant.p_tiles()][rows];
  alignas(8) float factors[variant.p_tiles()][rows];
  alignas(8) float sums[variant.p_tiles()][4][rows];
  RingBarriers<variant.p_tiles()> weights;

  __device__ void init() { weights.init(128, 128 * variant.adders()); }
};

/// Blocks of keys or of values, each of so many bytes.
template <int stages, int bytes>
struct Blocks {
  TileBuffer<bytes> tiles[stages];
};

template <int stages>
struct Blocks<stages, 0> {};

/// Results of warps with keys of their own, until they are merged.
template <ForwardVariant variant, bool needed = variant.stream()>
struct WarpResults {};

template <ForwardVariant variant>
struct WarpResults<variant, true> {
  alignas(16) float sums[variant.stream_warps()][variant.tile_rows()][variant.sums_pitch()];
  float2 weights[variant.stream_warps()][variant.tile_rows()];  ///< see OnlineSoftmax::partial()
};

/// What a block of a cluster that shares out a tile's keys has summed up.
template <ForwardVariant variant>
struct ClusterPart {
  alignas(16) float sums[variant.tile_rows()][variant.part_pitch()];
  float2 weights[variant.tile_rows()];  ///< see OnlineSoftmax::partial()
};

/// What the scheduler and the loaders know of a share that may be found ahead of time: see schedule.h.
template <ForwardVariant variant, bool needed = variant.keeps_rehearsed()>
struct Rehearsal {
  __device__ void init() {}
};

template <ForwardVariant variant>
struct Rehearsal<variant, true> {
  bool exists;              ///< is the first tile's work a rehearsed one?
  bool holds;               ///< and is it still that of the first tile?
  ptx::Mbarrier rehearsed;  ///< has the scheduler, or it will not
  ptx::Mbarrier looked_up;  ///< are the pages of that tile, by each loader

  __device__ void init() {
    rehearsed.init(1);
    looked_up.init(variant.loader_warps());
  }
};

/// The tiles that the first block of a cluster takes, as it tells the others: a ring, since the others may be behind.
template <ForwardVariant variant, bool needed = (variant.row_blocks() > 1)>
struct Tickets {
  static constexpr int stages = 1;
  __device__ void init() {}
};

template <ForwardVariant variant>
struct Tickets<variant, true> {
  static constexpr int stages = 4;
  int tile[stages];
  RingBarriers<stages> ring;  ///< full is each block's own, empty that of the first

  __device__ void init() { ring.init(1, variant.cluster_blocks - 1); }
};

template <ForwardVariant variant>
struct ForwardShared {
  static constexpr int work_stages = 4;

  TileBuffer<variant.q_bytes()> q_tiles[variant.q_stages];
  TileBuffer<variant.k_bytes()> k_tiles[variant.stages];
  TileBuffer<variant.v_bytes()> v_tiles[variant.stages];
  // As they are fetched, where they are prepared before they are consumed.
  [[no_unique_address]] Blocks<variant.fetched_stages, variant.fetched_k_bytes()> fetched_k_tiles;
  [[no_unique_address]] Blocks<variant.fetched_stages, variant.fetched_v_bytes()> fetched_v_tiles;
  [[no_unique_address]] SharedWeights<variant> weights;
  [[no_unique_address]] Blocks<1, variant.carried_shared_bytes()> carried_sums;
  [[no_unique_address]] WarpResults<variant> warp_results;
  [[no_unique_address]] SharedRows<variant> rows;
  alignas(16) TileWork works[work_stages];
  TileScales scales[variant.scaled() ? work_stages : 1];  ///< of these, where keys are e4m3
  // What each row of each consumer sees, where some of its keys are hidden.
  KeyRange visible[variant.keys_are_rows() ? 1 : 64 * variant.warpgroups];
  // Of rows, by each of the consumers that have them in common: what its weights are relative to, and their sums. The
  // former of carried sums, too.
  float references[(variant.wide && !variant.transposed()) || variant.e4m3 ? 64 * variant.warpgroups : 1];
  float weight_sums[variant.wide && !variant.transposed() ? 64 * variant.warpgroups : 1];
  [[no_unique_address]] Rehearsal<variant> rehearsal;
  [[no_unique_address]] Tickets<variant> tickets;
  int is_last[variant.row_groups()];  ///< whether the parts of some rows are all done
  RingBarriers<variant.q_stages> q;
  RingBarriers<variant.stages> k;
  RingBarriers<variant.stages> v[variant.v_slices()];                                  ///< of each slice of the values
  RingBarriers<variant.prepares() ? variant.fetched_stages : 1> fetched_k, fetched_v;  ///< before they are prepared
  RingBarriers<work_stages> work;
  ptx::Mbarrier begun[2];                   ///< is every second tile: those after it may be taken
  ptx::Mbarrier readable;                   ///< is all memory: earlier kernels have ended
  ptx::Mbarrier v_fetched[variant.stages];  ///< of values that the loader changes before consumers may have them
  ptx::Mbarrier weighed[variant.consumers_of_row()];  ///< a block, by each of the consumers of the same rows

  /// Where keys will be fetched to, before there are any; or queries, since another block of a cluster may fetch keys
  /// while this one still counts.
  __device__ BatchSteps& batch_steps() {
    if constexpr (variant.unit_blocks() > 1) {
      return *reinterpret_cast<BatchSteps*>(q_tiles);
    } else if constexpr (variant.widens()) {
      return *reinterpret_cast<BatchSteps*>(&fetched_k_tiles);
    } else {
      return *reinterpret_cast<BatchSteps*>(k_tiles);
    }
  }

  /// Where keys and values were, once all of the tile are consumed.
  __device__ ClusterPart<variant>& part() {
    static_assert(!variant.merges_in_cluster ||
                  (variant.has_room_for_part() && sizeof(ClusterPart<variant>) == variant.part_bytes()));
    return *reinterpret_cast<ClusterPart<variant>*>(k_tiles);
  }

  __device__ void init() {
    constexpr int producers = variant.gather ? variant.loader_warps() * 32 : 1;
    constexpr int consumer_warps = 4 * variant.warpgroups;
    constexpr int preparers = variant.preparer_warps();
    // Where threads write what others read as threads do, each lane arrives for what it has read itself.
    constexpr int arrivals_of_warp = variant.keys_are_rows() && variant.gather ? 32 : 1;
    constexpr int scorers = variant.transposed() ? variant.scorers() : variant.warpgroups;
    constexpr int adders = variant.transposed() ? variant.adders() : variant.warpgroups;
    q.init(variant.widens_queries() && preparers > 0 ? preparers : producers, 4 * scorers * arrivals_of_warp);
    // Those of transposed.h take blocks in turns. In a cluster the consumers of all its blocks have done with a buffer
    // before it is filled again, in all of them.
    k.init(variant.widens() ? preparers : producers,
           4 * (variant.transposed() ? 1 : scorers) * arrivals_of_warp * variant.cluster_blocks);
    for (RingBarriers<variant.stages>& slice : v) {
      slice.init(variant.prepares() ? preparers : producers,
                 4 * adders * arrivals_of_warp * variant.cluster_of_values() / variant.v_slices());
    }
    constexpr int readers = variant.gather ? 32 * preparers : preparers;
    if constexpr (variant.widens()) fetched_k.init(producers, readers);
    if constexpr (variant.prepares()) fetched_v.init(producers, readers * variant.cluster_blocks);
    work.init(1, 32 * (variant.loader_warps() + preparers + consumer_warps));
    for (ptx::Mbarrier& barrier : begun) barrier.init(1);
    readable.init(1);
    rehearsal.init();
    for (ptx::Mbarrier& barrier : v_fetched) barrier.init(1);
    tickets.init();
    for (ptx::Mbarrier& barrier : weighed) barrier.init(32);  // lanes that store references
    rows.init();
    ptx::fence_mbarrier_init();
  }
};

/// Tells that this warp has read a buffer as threads do. Where threads have written it, each lane tells for itself.
template <ForwardVariant variant>
__device__ inline void release_read(ptx::Mbarrier& empty) {
  if constexpr (variant.gather) {
    empty.arrive();
  } else {
    __syncwarp();
    release_for<variant.cluster_blocks>(empty);
  }
}

}  // namespace mate::cuda
