// The preparers of the forward kernel: warps that make what is multiplied of what is fetched, where that is e4m3.
//
// | who       | does                                                               | waits for       | tells           |
// | --------- | ------------------------------------------------------------------ | --------------- | --------------- |
// | loaders   | fetch a block of values, or of keys, as it is                      | fetched_*.empty | fetched_*.full  |
// | preparers | widen or transpose it, without values that no row sees, which may  | fetched_*.full, | v.full, k.full, |
// |           | be NaN                                                             | v.empty,k.empty | fetched_*.empty |
// |           | fetch and widen the tile's queries, if they are e4m3               | q.empty         | q.full          |
//
// Where elements of 16 bits are multiplied, everything is widened: consumers find what they would if the tensors were
// of 16 bits, and memory is read at half the cost. Where e4m3 is multiplied, only values are changed: they have to lie
// along the keys, which the matrix units transpose for elements of 16 bits alone.
#pragma once

#include "forward_shared.h"
#include "load.h"
#include "tile_rows.h"
#include "transpose.h"
#include "widen.h"

namespace mate::cuda {

template <ForwardVariant variant>
class Preparer {
 public:
  __device__ Preparer(const ForwardArguments& arguments, ForwardShared<variant>& shared)
      : a_(arguments), shared_(shared) {}

  __device__ void run() {
    for (;; work_.advance()) {
      shared_.work.full[work_.stage()].wait(work_.parity());
      const TileWork& work = shared_.works[work_.stage()];
      if (work.sequence < 0) break;
      prepare(work);
      shared_.work.empty[work_.stage()].arrive();
    }
    if constexpr (variant.scores_ahead() && variant.widens()) announce_no_more(shared_.k, next_, false);
  }

 private:
  using Place = RingPlace<variant.stages>;

  __device__ void prepare(const TileWork& work) {
    if constexpr (variant.widens()) {
      widen(work);
    } else {
#pragma unroll 1
      for (int n = work.blocks.end - 1; n >= work.blocks.begin; --n) {
        prepare_values(work, n, next_);
        next_.advance();
      }
    }
  }

  /// A tile's queries, and its blocks: keys ahead of values.
  __device__ void widen(const TileWork& work) {
    const int last = work.blocks.end - 1;
#pragma unroll 1
    for (int n = last; n >= work.blocks.begin - 1; --n) {
      const bool has_keys = n >= work.blocks.begin;
      if (has_keys) {
        prepare_block(shared_.fetched_k, shared_.fetched_k_tiles.tiles, shared_.k, shared_.k_tiles, next_,
                      [&](const unsigned char* from, unsigned char* to) {
                        widen_block<variant.head_dim>(from, to, [](int) { return true; });
                      });
        next_.advance();
      }
      if (n < last) prepare_values(work, n + 1, next_.before(has_keys ? 2 : 1));
      if (variant.widens_queries() && n == last) widen_queries(work);
    }
  }

  __device__ void prepare_values(const TileWork& work, int n, Place place) {
    const int begin = work.seen.begin - n * variant.block_keys;
    const int end = work.seen.end - n * variant.block_keys;
    prepare_block(shared_.fetched_v, shared_.fetched_v_tiles.tiles, shared_.v[0], shared_.v_tiles, place,
                  [&](unsigned char* from, unsigned char* to) {
                    if constexpr (variant.e4m3) {
                      if (!variant.gather && (begin > 0 || end < variant.block_keys)) clear_columns(from, begin, end);
                      Transposed::run(from, to, warp());
                    } else {
                      widen_block<variant.head_dim_v>(from, to, [&](int row) { return row >= begin && row < end; });
                    }
                  });
  }

  using Transposed = Transposition<variant.block_keys, variant.head_dim_v, variant.preparer_warps()>;

  /// Clears rows before `begin` and from `end` on, of the columns that this warp transposes. The fence of announce()
  /// stands between that and the next block of keys there, whichever block of a cluster fetches it.
  __device__ static void clear_columns(unsigned char* tile, int begin, int end) {
    const int lane = static_cast<int>(threadIdx.x % 32);
#pragma unroll 1
    for (int piece = Transposed::first_piece(warp()); piece < Transposed::end_piece(warp()); ++piece) {
#pragma unroll 1
      for (int row = lane; row < variant.block_keys; row += 32) {
        if (row >= begin && row < end) continue;
        *reinterpret_cast<uint4*>(tile + piece_offset<variant.block_keys>(row, piece)) = uint4{};
      }
    }
    __syncwarp();
  }

  /// `change(from, to)` makes of a block that is fetched what is consumed.
  template <typename FetchedTile, typename Tile, typename Change>
  __device__ void prepare_block(RingBarriers<variant.fetched_stages>& fetched, FetchedTile* fetched_tiles,
                                RingBarriers<variant.stages>& prepared, Tile* prepared_tiles, Place to,
                                const Change& change) {
    const auto from = to.template in<variant.fetched_stages>();
    fetched.full[from.stage()].wait(from.parity());
    prepared.empty[to.stage()].wait(to.parity() ^ 1);
    change(fetched_tiles[from.stage()].rows, prepared_tiles[to.stage()].rows);
    announce(prepared.full[to.stage()]);
    release_read<variant>(fetched.empty[from.stage()]);
  }

  /// `is_needed(row)`: else it becomes zeros.
  template <int padded, typename IsNeeded>
  __device__ void widen_block(const unsigned char* from, unsigned char* to, const IsNeeded& is_needed) const {
    constexpr int rows = variant.block_keys;
    widen_rows<rows, padded, true>(to, [&](int row, int piece) {
      const uint4 narrow = *reinterpret_cast<const uint4*>(from + piece_offset<rows>(row, piece));
      return is_needed(row) ? narrow : uint4{};
    });
  }

  __device__ void widen_queries(const TileWork& work) {
    const auto place = work_.template in<variant.q_stages>();  // tiles are as many as their queries
    shared_.q.empty[place.stage()].wait(place.parity() ^ 1);
    const Problem& p = a_.problem;
    const int slot = p.query_slot(work.sequence);
    unsigned char* const tile = shared_.q_tiles[place.stage()].rows;
    widen_rows<variant.tile_rows(), variant.head_dim, false>(tile, [&](int row, int piece) {
      const RowPlace of_row = place_of(a_, work, row);
      const int column = 16 * piece;
      if (of_row.query >= work.used || column >= p.head_dim) return uint4{};
      const auto* const source = p.q.at<const unsigned char>(slot, row_in_tensor(work, of_row), of_row.head);
      return read_piece(source + column, min(p.head_dim - column, 16), a_.copy_bytes);
    });
    announce(shared_.q.full[place.stage()]);
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
    const int lane = ptx::known_only_here(static_cast<int>(threadIdx.x % 32));
    // Lanes that read or write at one time are those of one row, or of two whose places differ in all of the swizzle's
    // bits that tell.
    const int row_of_lane = lanes_of_row == 8 ? lane / 8 : lane / 8 ^ (lane / 4 % 2 * 5);
#pragma unroll 1
    for (int first = warp() * group; first < rows; first += variant.preparer_warps() * group) {
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

  /// Among the preparers.
  __device__ static int warp() {
    return ptx::known_only_here(static_cast<int>(threadIdx.x)) / 32 -
           (4 * variant.producer_warpgroups() - variant.preparer_warps());
  }

  const ForwardArguments& a_;
  ForwardShared<variant>& shared_;
  RingPlace<ForwardShared<variant>::work_stages> work_;
  Place next_;  ///< of the keys that come next
};

}  // namespace mate::cuda
