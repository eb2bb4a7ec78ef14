// The rows of a tile, and those that nothing is computed for.
#pragma once

#include "element.h"
#include "ring.h"
#include "sharer.h"
#include "side_by_side.h"
#include "softmax.h"
#include "tile_work.h"

namespace mate::cuda {

/// Which query a row of a tile belongs to, and which head.
struct RowPlace {
  int query;  ///< beyond all others, where the tile ends before
  int head;
};
__device__ inline RowPlace place_of(const ForwardArguments& a, const TileWork& work, int row) {
  // Rounded down that is row / pack: half a row is far more than what is lost in rounding.
  const int query = static_cast<int>((row + 0.5F) * a.heads_reciprocal);
  return {row < a.rows_of_block ? work.first_query + query : max_length, work.unit * a.pack + row - query * a.pack};
}

/// Where a row's sums go, null where they are not needed, and what they are to be multiplied by, 0 where they are to
/// become 0.
struct RowTarget {
  void* row = nullptr;
  float share = 0;
};

/// Where it stands in q and out: in their slot of the sequence.
__device__ inline long long row_in_tensor(const TileWork& work, const RowPlace& place) {
  return static_cast<long long>(work.place.first_q) + place.query;
}

/// The sink of a query head, -inf where there is none.
__device__ inline float sink_of(const Problem& p, int head) {
  return p.sink.given() ? widen(p.sink.at(head), p.sink.type) : -infinity();
}

/// A warp writes a row of out that is 0, and its log-sum-exp.
__device__ inline void clear_row(const Problem& p, int slot, long long row, int head, float lse) {
  const int lane = ptx::known_only_here(threadIdx.x % 32);  // this is rare: it is not worth registers
  auto* const elements = p.out.at<unsigned short>(slot, row, head);
#pragma unroll 1
  for (int column = lane; column < p.head_dim_v; column += 32) elements[column] = 0;
  if (p.lse.data != nullptr && lane == 0) p.lse.at(slot, head, row) = lse;
}

/// A warp clears a tile whose rows see no keys, or are not to be computed.
__device__ inline void clear_tile(const ForwardArguments& a, const TileWork& work) {
  const Problem& p = a.problem;
#pragma unroll 1
  for (int row = 0; row < a.rows_of_block; ++row) {
    ptx::forget_shared_memory();
    const RowPlace place = place_of(a, work, row);
    if (place.query >= work.place.query_capacity) return;
    clear_row(p, p.query_slot(work.sequence), row_in_tensor(work, place), place.head,
              place.query < work.used ? sink_of(p, place.head) : -infinity());
  }
}

/// Rows that are in no tile: out 0, lse -inf. For one warp of each block of threads.
template <ForwardVariant variant>
__device__ void clear_rows_of_no_tile(const ForwardArguments& a) {
  const Problem& p = a.problem;
  const auto clear = [&](int slot, int row) {
#pragma unroll 1
    for (int head = 0; head < p.heads_q; ++head) clear_row(p, slot, row, head, -infinity());
  };
  if (p.ragged_queries() && a.served.which != Sequences::decodes) {
    // Those that belong to no sequence.
    const int begin = clamp(p.queries.cu_seqlens[0], 0, p.queries.rows);
    const int end = clamp(p.queries.cu_seqlens[p.batch], begin, p.queries.rows);
    const int rows = begin + p.queries.rows - end;
#pragma unroll 1
    for (int i = blockIdx.x; i < rows; i += gridDim.x) clear(0, i < begin ? i : end + i - begin);
  }
  if constexpr (variant.one_tile()) {
    // Rows past its one tile, of sequences that use fewer than they have room for, or are longer than max_seqlen_q
    // said.
    if (!p.ragged_queries() && a.served.which == Sequences::all) return;
    const int in_tile = divide(a.rows_of_block, a.pack);
    const int lane = threadIdx.x % 32;
    // Where there are more blocks of threads than runs of 32 sequences, several share the rows of one.
    const Sharer block{static_cast<int>(blockIdx.x), static_cast<int>(gridDim.x)};
    block.share(divide(p.batch, 32) + 1, [&](int run, Sharer of_run) {
      const int first = 32 * run;
      const int b = first + lane;
      int capacity = b < p.batch ? query_rows(p.queries, b).count : 0;
      if (b < p.batch && !serves(a, used_queries(p.queries, b, capacity))) capacity = 0;
#pragma unroll 1
      for (unsigned longer = __ballot_sync(~0U, capacity > in_tile); longer != 0; longer &= longer - 1) {
        const int source = __ffs(longer) - 1;
        const int first_row = query_rows(p.queries, first + source).first;
        const int count = __shfl_sync(~0U, capacity, source);
#pragma unroll 1
        for (int i = in_tile + of_run.number; i < count; i += of_run.count) {
          clear(p.query_slot(first + source), first_row + i);
        }
      }
    });
  }
}

}  // namespace mate::cuda
