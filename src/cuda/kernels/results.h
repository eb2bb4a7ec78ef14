// What becomes of a tile's sums: rows of out and their log-sum-exp, or a part of them, merged with the others by
// whoever is done last.
#pragma once

#include "forward_arguments.h"
#include "forward_variant.h"
#include "merge.h"
#include "ptx/global.h"
#include "store.h"
#include "tile_rows.h"

namespace mate::cuda {

/// Named barriers: 0 is __syncthreads, then come the turns of up to three consumers, then each by itself.
inline constexpr int first_turn_barrier = 1;
inline constexpr int first_warpgroup_barrier = 4;

/// Used by all threads of a consumer together.
template <ForwardVariant variant>
class ResultWriter {
 public:
  using Sums = float (&)[variant.head_dim_v / 2];

  /// `is_last` is in shared memory, and has room for each consumer.
  __device__ ResultWriter(const ForwardArguments& arguments, int group, int* is_last)
      : a_(arguments), group_(group), is_last_(is_last) {}

  /// Of a tile, or a part of one, whose keys have all been seen.
  __device__ void write(const TileWork& work, Sums sums, const OnlineSoftmax& softmax) const {
    const Problem& p = a_.problem;
    if constexpr (variant.splits) {
      if (work.part.count > 1) {
        store_part(work, sums, softmax);
        if (is_last_part(work)) merge_parts(work);
        return;
      }
    }
    const int slot = p.query_slot(work.sequence);
#pragma unroll
    for (int i = 0; i < rows_of_thread; ++i) {
      const RowPlace place = place_of(a_, work, group_ * 64 + accumulator_row(i));
      const bool exists = place.query < work.capacity;
      const long long row = static_cast<long long>(work.place.first_q) + place.query;
      float share;
      float lse = softmax.finish(i, sink_of(p, place.head), share);
      if (place.query >= work.used) {
        share = 0;
        lse = -infinity();
      }
      if (__any_sync(~0U, share == 0)) clear_row_if<variant.head_dim_v>(sums, i, share == 0);
      void* const out = exists ? p.out.at(slot, row, place.head) : nullptr;
      store_row<variant.element, variant.head_dim_v>(sums, i, share, out, p.head_dim_v, a_.wide_rows);
      if (exists && p.lse.data != nullptr && accumulator_column() == 0) p.lse.at(slot, place.head, row) = lse;
    }
  }

 private:
  /// A row of a slot of partial results.
  __device__ long long partial_row(const TileWork& work, int part, int row) const {
    return static_cast<long long>(work.part.slot(part)) * a_.parts.rows + row;
  }

  __device__ void store_part(const TileWork& work, Sums sums, const OnlineSoftmax& softmax) const {
#pragma unroll
    for (int i = 0; i < rows_of_thread; ++i) {
      const int row = group_ * 64 + accumulator_row(i);
      const float2 weight = softmax.partial(i);
      if (place_of(a_, work, row).query >= work.used) continue;
      const long long at = partial_row(work, work.part.index, row);
      float* const target = a_.parts.sums + at * variant.head_dim_v + accumulator_column();
#pragma unroll
      for (int j = 0; j < variant.head_dim_v / 8; ++j) {
        *reinterpret_cast<float2*>(target + 8 * j) = make_float2(sums[4 * j + 2 * i], sums[4 * j + 2 * i + 1]);
      }
      if (accumulator_column() == 0) reinterpret_cast<float2*>(a_.parts.weights)[at] = weight;
    }
  }

  /// Tells that this warpgroup's part is done. Whether it was the last of its rows.
  __device__ bool is_last_part(const TileWork& work) const {
    if (work.part.reported == 0) return false;
    await_warpgroup();
    if (threadIdx.x % 128 == 0) {
      int* const done = a_.counters + work.part.counter * variant.warpgroups + group_;
      const bool last = ptx::add_and_synchronize(done, work.part.reported) == work.part.count - work.part.reported;
      if (last) *done = 0;
      is_last_[group_] = last;
    }
    await_warpgroup();
    return is_last_[group_];
  }

  /// The warps of this warpgroup merge the parts of its rows, each a row at a time.
  __device__ void merge_parts(const TileWork& work) const {
    const Problem& p = a_.problem;
    const int slot = p.query_slot(work.sequence);
#pragma unroll 1
    for (int row = group_ * 64 + threadIdx.x % 128 / 32; row < group_ * 64 + 64; row += 4) {
      const RowPlace place = place_of(a_, work, row);
      if (place.query >= work.capacity) return;
      const long long out_row = static_cast<long long>(work.place.first_q) + place.query;
      if (place.query >= work.used) {
        clear_row(p, slot, out_row, place.head, -infinity());
        continue;
      }
      auto* const out = static_cast<unsigned short*>(p.out.at(slot, out_row, place.head));
      const float lse = merge_row<float4, true>(
          work.part.count, sink_of(p, place.head), p.head_dim_v,
          [&](int part) {
            const auto* const weights = reinterpret_cast<const float2*>(a_.parts.weights);
            const float2 weight = __ldcg(weights + partial_row(work, part, row));
            return PartWeight{weight.x, weight.y};
          },
          [&](int part) { return a_.parts.sums + partial_row(work, part, row) * variant.head_dim_v; },
          [&](int column, const float(&sums)[4]) {
            const unsigned words[2] = {pack<variant.element>(sums[0], sums[1]),
                                       pack<variant.element>(sums[2], sums[3])};
            if (a_.wide_rows) {
              *reinterpret_cast<uint2*>(out + column) = make_uint2(words[0], words[1]);
              return;
            }
            for (int i = 0; i < 4 && column + i < p.head_dim_v; ++i) {
              out[column + i] = static_cast<unsigned short>(words[i / 2] >> i % 2 * 16);
            }
          });
      if (p.lse.data != nullptr && first_lane()) p.lse.at(slot, place.head, out_row) = lse;
    }
  }

  __device__ void await_warpgroup() const { ptx::barrier_sync(first_warpgroup_barrier + group_, 128); }

  const ForwardArguments& a_;
  int group_;
  int* is_last_;
};

}  // namespace mate::cuda
