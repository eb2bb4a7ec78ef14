// The rows of a tile, and those that nothing is computed for.
#pragma once

#include "element.h"
#include "ring.h"
#include "softmax.h"
#include "tile_work.h"

namespace mate::cuda {

/// Which query a row of a tile belongs to, and which head.
struct RowPlace {
  int query;  ///< beyond all others, where the tile ends before
  int head;
};
__device__ inline RowPlace place_of(const ForwardArguments& a, const TileWork& work, int row) {
  const int packed = work.first_head + row;
  // Rounded down that is packed / pack: half a row is far more than what is lost in rounding.
  const int query = static_cast<int>((packed + 0.5F) * a.heads_reciprocal);
  return {row < a.tile_rows ? work.first_query + query : max_length, work.unit * a.pack + packed - query * a.pack};
}

/// The sink of a query head, -inf where there is none.
__device__ inline float sink_of(const Problem& p, int head) {
  return p.sink.given() ? widen(p.sink.at(head), p.sink.type) : -infinity();
}

/// A warp writes a row of out that is 0, and its log-sum-exp.
__device__ inline void clear_row(const Problem& p, int slot, long long row, int head, float lse) {
  const int lane = threadIdx.x % 32;
  auto* const elements = static_cast<unsigned short*>(p.out.at(slot, row, head));
#pragma unroll 1
  for (int column = lane; column < p.head_dim_v; column += 32) elements[column] = 0;
  if (p.lse.data != nullptr && lane == 0) p.lse.at(slot, head, row) = lse;
}

/// A warp clears a tile whose rows see no keys, or are not to be computed.
__device__ inline void clear_tile(const ForwardArguments& a, const TileWork& work) {
  const Problem& p = a.problem;
#pragma unroll 1
  for (int row = 0; row < a.tile_rows; ++row) {
    ptx::forget_shared_memory();
    const RowPlace place = place_of(a, work, row);
    if (place.query >= work.capacity) return;
    clear_row(p, p.query_slot(work.sequence), static_cast<long long>(work.place.first_q) + place.query, place.head,
              place.query < work.used ? sink_of(p, place.head) : -infinity());
  }
}

/// Rows of ragged tensors that belong to no sequence: out 0, lse -inf.
__device__ inline void clear_rows_outside(const ForwardArguments& a) {
  const Problem& p = a.problem;
  if (!p.ragged_queries()) return;
  const int begin = clamp(p.queries.cu_seqlens[0], 0, p.queries.rows);
  const int end = clamp(p.queries.cu_seqlens[p.batch], begin, p.queries.rows);
  const int rows = begin + p.queries.rows - end;
  const int warps = blockDim.x / 32;
  for (int i = blockIdx.x * warps + threadIdx.x / 32; i < rows; i += gridDim.x * warps) {
    const int row = i < begin ? i : end + i - begin;
    for (int head = 0; head < p.heads_q; ++head) clear_row(p, 0, row, head, -infinity());
  }
}

}  // namespace mate::cuda
