// Hands out the tiles of a call (a dynamic persistent scheduler): each block of threads, or cluster of them, begins
// with the tile of its own number and then takes the next one that nobody has taken, so that those which had little to
// do do more. Where the blocks of a cluster share out the keys of a tile, there are clusters for all tiles, and each
// has one or none.
#pragma once

#include "forward_shared.h"
#include "side_by_side.h"
#include "tile_work.h"
#include "warp.h"

namespace mate::cuda {

/// Used by all lanes of one warp together.
template <ForwardVariant variant>
class TileScheduler : TileFinder<variant> {
 public:
  __device__ TileScheduler(const ForwardArguments& arguments, ForwardShared<variant>& shared)
      : TileFinder<variant>(arguments), tickets_(shared.tickets) {}

  /// Whether the first tile may be found while earlier kernels run: where its number says whose it is.
  __device__ bool may_begin_early() const { return !problem().ragged_queries() || problem().batch == 1; }

  /// Begins with the first tile, perhaps once more.
  __device__ void begin(const BatchSteps&) {
    index_ = -1;
    first_sequence_ = 0;
    tiles_before_ = 0;
  }

  /// Whether there is a tile, and what was read of its sequence is what memory says now: it has been read twice, once
  /// for how many tiles there are.
  __device__ bool still_holds(const TileWork& work) const {
    const bool exists = work.sequence >= 0 && index_in_sequence_ < all_tiles_of(work.sequence);
    const bool same = exists && is_same_place(problem().sequence(work.sequence), work.place);
    return __all_sync(~0U, same);
  }

  /// Whether enough tiles seem to be left for all who take some.
  __device__ bool has_plenty() const { return a_.expected_tiles - index_ > 2 * workers(); }

  /// Writes the next tile to `work`. Returns whether there was one.
  __device__ bool next(TileWork& work) {
    const bool first = index_ < 0;
    index_ = first ? first_index() : variant.merges_in_cluster ? max_length : take();
    const int sequence = find_sequence();
    if (threadIdx.x % 32 == 0) {
      work.sequence = sequence;
      if (sequence >= 0) {
        this->locate(work);
        ptx::forget_shared_memory();
        choose_tile(work);
      } else if (!variant.merges_in_cluster && takes() && !first && index_ - workers() == tiles_before_ - 1) {
        // Each tile is followed by one request for another, so that there are as many as tiles: this was the last.
        *a_.counters = 0;
      }
    }
    if (sequence < 0) return false;
    this->find_keys(work);
    if constexpr (variant.merges_in_cluster) return take_share(work);
    return true;
  }

 private:
  using TileFinder<variant>::a_;
  using TileFinder<variant>::problem;
  using TileFinder<variant>::units;

  /// Whether the first block of a cluster tells the others which tiles it takes.
  static constexpr bool tells = variant.row_blocks() > 1;

  /// Blocks of threads that have a tile together.
  __device__ static int cluster_size() {
    return variant.merges_in_cluster ? ptx::blocks_of_cluster() : variant.cluster_blocks;
  }

  /// Leaves this block its share of a tile's keys. Returns whether it has one, or all of a tile without keys.
  __device__ static bool take_share(TileWork& work) {
    __syncwarp();
    const BlockRange blocks = work.blocks;
    const int parts = max(min(cluster_size(), blocks.size()), 1);
    const int number = ptx::block_of_cluster();
    __syncwarp();
    if (first_lane()) {
      work.parts.count = parts;
      work.blocks = {blocks.begin + divide(blocks.size() * number, parts),
                     blocks.begin + divide(blocks.size() * (number + 1), parts)};
      if (number >= parts) work.sequence = -1;
    }
    __syncwarp();
    return number < parts;
  }

  /// Whether this block is the one of its cluster that takes tiles and tells the others.
  __device__ static bool takes() { return !tells || ptx::block_of_cluster() == 0; }

  /// Blocks of threads, or clusters, that take tiles: not worth a register.
  __device__ int workers() const { return max(workers_of_launch(a_, static_cast<int>(gridDim.x)) / cluster_size(), 1); }

  /// Blocks that have nothing to do begin behind all tiles.
  __device__ int first_index() const {
    const int number = static_cast<int>(blockIdx.x) / cluster_size();
    return number < workers() ? number : max_length;
  }

  /// Of all units: not worth a register where all sequences have as many.
  __device__ int all_tiles_of(int b) const {
    const int capacity = ptx::known_only_here(query_rows(problem().queries, b).count);
    return serves(a_, used_queries(problem().queries, b, capacity)) ? this->tiles_of_capacity(capacity) * units() : 0;
  }

  /// The sequence of tile index_, whose place in it becomes index_in_sequence_; -1 where there are no more.
  __device__ int find_sequence() {
    const int lane = threadIdx.x % 32;
    if (!problem().ragged_queries() && a_.served.which == Sequences::all) {
      const int tiles = all_tiles_of(0);
      tiles_before_ = tiles * problem().batch;
      if (index_ >= tiles_before_) return -1;
      index_in_sequence_ = index_ % tiles;
      return index_ / tiles;
    }
    // 32 sequences at a time: tiles are handed out in ascending order, so that the search goes on where it stopped.
    for (; first_sequence_ < problem().batch; first_sequence_ += 32) {
      const int b = first_sequence_ + lane;
      const int tiles = b < problem().batch ? all_tiles_of(b) : 0;
      const int end = tiles_before_ + warp_prefix_sum(tiles);
      const unsigned beyond = __ballot_sync(~0U, end > index_);
      if (beyond != 0) {
        const int found = __ffs(beyond) - 1;
        index_in_sequence_ = index_ - __shfl_sync(~0U, end - tiles, found);
        return first_sequence_ + found;
      }
      tiles_before_ = __shfl_sync(~0U, end, 31);
    }
    return -1;
  }

  __device__ int take() {
    int taken = 0;
    if (takes() && first_lane()) taken = workers() + atomicAdd(a_.counters, 1);
    taken = __shfl_sync(~0U, taken, 0);
    if constexpr (tells) {
      const int stage = ticket_.stage();
      ptx::Mbarrier& full = tickets_.ring.full[stage];
      ptx::Mbarrier& empty = tickets_.ring.empty[stage];
      if (takes()) {
        empty.wait(ticket_.parity() ^ 1);
        const int lane = threadIdx.x % 32;
        if (lane > 0 && lane < variant.cluster_blocks) ptx::send_to(lane, tickets_.tile[stage], taken, full);
      } else {
        if (first_lane()) full.arrive_expecting(sizeof(int));
        full.wait_for_cluster(ticket_.parity());
        taken = tickets_.tile[stage];
        __syncwarp();
        if (first_lane()) ptx::arrive_in(0, empty);
      }
      ticket_.advance();
    }
    return taken;
  }

  /// Key heads come in sections whose keys fit the L2 cache together, and in each section the tiles with the most keys
  /// first: short ones fill the gaps at the end.
  __device__ void choose_tile(TileWork& work) const {
    const int heads = problem().heads_k;
    const int sk = work.place.lengths.sk;
    const int tiles = this->tiles_of_capacity(work.place.query_capacity);
    int first_unit = 0;
    int width = units();
    if (static_cast<long long>(sk) * heads > a_.keys_in_l2) {
      const int heads_in_l2 = max(divide(a_.keys_in_l2, sk), 1);
      const int sections = divide(heads - 1, heads_in_l2) + 1;
      // Section i has key heads i * heads / sections onward.
      const int head = divide(index_in_sequence_, tiles * a_.units_of_key_head);
      const int section = divide((head + 1) * sections - 1, heads);
      const int first_head = divide(section * heads, sections);
      first_unit = first_head * a_.units_of_key_head;
      width = (divide((section + 1) * heads, sections) - first_head) * a_.units_of_key_head;
    }
    const int index = index_in_sequence_ - first_unit * tiles;
    const int tiles_after = divide(index, width);
    work.unit = first_unit + index - tiles_after * width;
    work.tile = tiles - 1 - tiles_after;
  }

  Tickets<variant>& tickets_;
  RingPlace<Tickets<variant>::stages> ticket_;
  int index_ = -1;
  int first_sequence_ = 0;
  int tiles_before_ = 0;  ///< of all sequences before first_sequence_; at the end, of all
  int index_in_sequence_ = 0;
};

}  // namespace mate::cuda
