// The wideners of the forward kernel: warps that make elements of 16 bits, which are multiplied, of e4m3.
//
// | who      | does                                                                | waits for       | tells           |
// | -------- | ------------------------------------------------------------------- | --------------- | --------------- |
// | loaders  | fetch a block of keys, or of values, as it is                       | fetched.*.empty | fetched.*.full  |
// | wideners | widen it, without values that no row sees, which may be NaN         | fetched.*.full, | k.full, v.full, |
// |          |                                                                     | k.empty,v.empty | fetched.*.empty |
// |          | fetch and widen the tile's queries, if they are e4m3                | q.empty         | q.full          |
//
// So consumers find what they would if the tensors were of 16 bits, and memory is read at half the cost.
#pragma once

#include "forward_shared.h"
#include "load.h"
#include "tile_rows.h"
#include "widen.h"

namespace mate::cuda {

template <ForwardVariant variant>
class Widener {
 public:
  __device__ Widener(const ForwardArguments& arguments, ForwardShared<variant>& shared)
      : a_(arguments), shared_(shared) {}

  __device__ void run() {
    for (;; work_.advance()) {
      shared_.work.full[work_.stage()].wait(work_.parity());
      const TileWork& work = shared_.works[work_.stage()];
      if (work.sequence < 0) break;
      widen(work);
      shared_.work.empty[work_.stage()].arrive();
    }
    if constexpr (!variant.wide) {
      // Consumers that score ahead wait for the keys of the next block, be there one or not.
      shared_.k.empty[next_.stage()].wait(next_.parity() ^ 1);
      if (first_lane()) shared_.k.full[next_.stage()].arrive();
    }
  }

 private:
  using Place = RingPlace<variant.stages>;

  /// A tile's queries, and its blocks: keys ahead of values, unless there is no room for them until values are there.
  __device__ void widen(const TileWork& work) {
    constexpr bool ahead = variant.stages > 1;
    const int last = work.blocks.end - 1;
#pragma unroll 1
    for (int n = last; n >= work.blocks.begin - 1; --n) {
      const bool has_keys = n >= work.blocks.begin;
      if (!ahead && n < last) widen_values(work, n + 1, next_.before(1));
      if (has_keys) {
        const auto keys = [](int) { return true; };
        widen_block<variant.head_dim>(shared_.fetched.k, shared_.fetched_tiles.k, shared_.k, shared_.k_tiles, next_,
                                      keys);
        next_.advance();
      }
      if (ahead && n < last) widen_values(work, n + 1, next_.before(has_keys ? 2 : 1));
      if (variant.widens_queries() && n == last) widen_queries(work);
    }
  }

  __device__ void widen_values(const TileWork& work, int n, Place place) {
    const int begin = work.seen.begin - n * variant.block_keys;
    const int end = work.seen.end - n * variant.block_keys;
    widen_block<variant.head_dim_v>(shared_.fetched.v, shared_.fetched_tiles.v, shared_.v, shared_.v_tiles, place,
                                    [&](int row) { return row >= begin && row < end; });
  }

  /// `is_needed(row)`: else it becomes zeros.
  template <int padded, typename FetchedTile, typename WidenedTile, typename IsNeeded>
  __device__ void widen_block(RingBarriers<variant.fetched_stages>& fetched, FetchedTile* fetched_tiles,
                              RingBarriers<variant.stages>& widened, WidenedTile* widened_tiles, Place to,
                              const IsNeeded& is_needed) {
    constexpr int rows = variant.block_keys;
    const auto from = to.template in<variant.fetched_stages>();
    fetched.full[from.stage()].wait(from.parity());
    widened.empty[to.stage()].wait(to.parity() ^ 1);
    const unsigned char* const source = fetched_tiles[from.stage()].rows;
    widen_rows<rows, padded, true>(widened_tiles[to.stage()].rows, [&](int row, int piece) {
      const uint4 narrow = *reinterpret_cast<const uint4*>(source + piece_offset<rows>(row, piece));
      return is_needed(row) ? narrow : uint4{};
    });
    announce(widened.full[to.stage()]);
    if (variant.gather) {
      fetched.empty[from.stage()].arrive();
    } else {
      release(fetched.empty[from.stage()]);
    }
  }

  __device__ void widen_queries(const TileWork& work) {
    const auto place = work_.template in<variant.q_stages>();  // tiles are as many as their queries
    shared_.q.empty[place.stage()].wait(place.parity() ^ 1);
    unsigned char* const tile = shared_.q_tiles[place.stage()].rows;
    widen_rows_of_queries<variant.head_dim>(tile, work, a_.problem.q, a_.problem.head_dim);
    if constexpr (variant.qv) {
      constexpr int offset = variant.tile_rows() * chunks_of(variant.head_dim) * chunk_row_bytes;
      widen_rows_of_queries<variant.head_dim_v>(tile + offset, work, a_.problem.qv, a_.problem.head_dim_v);
    }
    announce(shared_.q.full[place.stage()]);
  }

  template <int padded>
  __device__ void widen_rows_of_queries(unsigned char* tile, const TileWork& work, const Rows& rows, int head_dim) {
    const int slot = a_.problem.query_slot(work.sequence);
    widen_rows<variant.tile_rows(), padded, false>(tile, [&](int row, int piece) {
      const RowPlace place = place_of(a_, work, row);
      const int column = 16 * piece;
      if (place.query >= work.used || column >= head_dim) return uint4{};
      const auto* const source = static_cast<const unsigned char*>(
          rows.at(slot, static_cast<long long>(work.place.first_q) + place.query, place.head));
      return read_piece(source + column, min(head_dim - column, 16), a_.copy_bytes);
    });
  }

  /// Tells that this warp's part of a tile is written.
  __device__ static void announce(ptx::Mbarrier& full) {
    ptx::fence_proxy_async();
    __syncwarp();
    if (first_lane()) full.arrive();
  }

  /// Warps take groups of eight rows in turns. load(row, piece) is a piece of 16 elements of a row.
  template <int rows, int padded, bool unrolled, typename Load>
  __device__ void widen_rows(unsigned char* tile, const Load& load) const {
    constexpr int group = 8;
    constexpr int pieces = padded / 16;
    constexpr int lanes_of_row = pieces <= 4 ? 4 : 8;
    constexpr int steps = group * lanes_of_row / 32;
    // What follows from the thread is not worth registers all along.
    const int thread = ptx::known_only_here(static_cast<int>(threadIdx.x));
    const int warp = thread / 32 - (4 * variant.producer_warpgroups() - variant.widener_warps());
    const int lane = thread % 32;
    // Lanes that read or write at one time are those of one row, or of two whose places differ in all of the swizzle's
    // bits that tell.
    const int row_of_lane = lanes_of_row == 8 ? lane / 8 : lane / 8 ^ (lane / 4 % 2 * 5);
#pragma unroll 1
    for (int first = warp * group; first < rows; first += variant.widener_warps() * group) {
#pragma unroll(unrolled ? steps* divide_up(pieces, lanes_of_row) : 1)
      for (int i = 0; i < steps * divide_up(pieces, lanes_of_row); ++i) {
        const int row = first + i % steps * 4 + row_of_lane;
        const int piece = i / steps * lanes_of_row + lane % lanes_of_row;
        if (pieces % lanes_of_row != 0 && piece >= pieces) continue;
        uint4 halves[2];
        widen_piece<variant.element()>(load(row, piece), halves);
        // Lanes of the row's other chunk write the other half first, so that all write to different banks.
        const bool swaps = lanes_of_row == 8 && lane % 8 >= 4;
        const auto place = [&](int half) {
          return reinterpret_cast<uint4*>(tile + piece_offset<rows>(row, 2 * piece + half));
        };
        *place(swaps) = swaps ? halves[1] : halves[0];
        *place(!swaps) = swaps ? halves[0] : halves[1];
      }
    }
  }

  const ForwardArguments& a_;
  ForwardShared<variant>& shared_;
  RingPlace<ForwardShared<variant>::work_stages> work_;
  Place next_;  ///< of the keys that come next
};

}  // namespace mate::cuda
