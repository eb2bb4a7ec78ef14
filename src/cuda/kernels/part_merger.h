// Results over parts of tiles' keys: where they lie, and how those of a row are merged.
#pragma once

#include "element.h"
#include "forward_arguments.h"
#include "merge.h"
#include "tile_rows.h"

namespace mate::cuda {

/// `out_type` is that of out. Rows of sums have `columns` columns, or as many as the arguments say.
template <ElementType out_type, int columns = 0>
class PartMerger {
 public:
  __device__ explicit PartMerger(const ForwardArguments& arguments) : a_(arguments) {}

  /// A warp merges the `parts` parts of a row, which lie where read(part, column) finds four sums and weight_of(part)
  /// their PartWeight, up to `at_once` of them at one time. Returns false where the tile has no such row, nor any
  /// behind.
  template <int at_once, typename WeightOf, typename Read>
  __device__ bool merge_row_of(const TileWork& work, int row, int parts, float value_factor, const WeightOf& weight_of,
                               const Read& read) const {
    const Problem& p = a_.problem;
    const int slot = p.query_slot(work.sequence);
    const RowPlace place = place_of(a_, work, row);
    if (place.query >= work.place.query_capacity) return false;
    const long long out_row = row_in_tensor(work, place);
    if (place.query >= work.used) {
      clear_row(p, slot, out_row, place.head, -infinity());
      return true;
    }
    auto* const out = p.out.at<unsigned short>(slot, out_row, place.head);
    float lse = 0;
    merge_row<float4, true, at_once>(
        parts, p.head_dim_v, weight_of, read,
        [&](PartWeight all) {
          float share;
          lse = finish(all, place.head, share);
          return share;
        },
        [&](int column, float(&sums)[4]) { store_columns(out, column, sums, value_factor); });
    if (p.lse.data != nullptr && first_lane()) p.lse.at(slot, place.head, out_row) = lse;
    return true;
  }

  /// The same of the parts that blocks of threads have stored.
  template <int at_once>
  __device__ bool merge_row_of(const TileWork& work, int row, float value_factor) const {
    return merge_row_of<at_once>(
        work, row, work.parts.count, value_factor, [&](int part) { return weight_of(work, part, row); },
        [&](int part, int column) { return sums_of(work, part, row, column); });
  }

 protected:
  /// A row of a slot of partial results.
  __device__ long long partial_row(const TileWork& work, int part, int row) const {
    return static_cast<long long>(work.parts.slot(part)) * a_.parts.rows + row;
  }
  __device__ float* sums_of_part(long long row) const {
    return a_.parts.sums + row * (columns > 0 ? columns : a_.parts.columns);
  }
  /// The exponent that they are relative to, and their sum.
  __device__ float2* weight_of_part(long long row) const { return reinterpret_cast<float2*>(a_.parts.weights) + row; }

  /// What a part has stored.
  __device__ PartWeight weight_of(const TileWork& work, int part, int row) const {
    const float2 weight = __ldcg(weight_of_part(partial_row(work, part, row)));
    return PartWeight{weight.x, weight.y};
  }
  __device__ float4 sums_of(const TileWork& work, int part, int row, int column) const {
    return __ldcg(reinterpret_cast<const float4*>(sums_of_part(partial_row(work, part, row)) + column));
  }

  /// Ends a row whose parts have such weights: its log-sum-exp, and what its sums are to be multiplied by.
  __device__ float finish(const PartWeight& all, int head, float& share) const {
    const float lse = finish_softmax(all.max, all.sum, share);
    return add_sink(lse, sink_of(a_.problem, head), share);
  }

  /// Columns of a row of out.
  __device__ void store_columns(unsigned short* out, int column, float (&sums)[4], float value_factor) const {
#pragma unroll
    for (float& sum : sums) sum *= sum == 0 ? 1 : value_factor;
    const unsigned words[2] = {pack<out_type>(sums[0], sums[1]), pack<out_type>(sums[2], sums[3])};
    if (a_.wide_rows) {
      *reinterpret_cast<uint2*>(out + column) = make_uint2(words[0], words[1]);
      return;
    }
    for (int i = 0; i < 4 && column + i < a_.problem.head_dim_v; ++i) {
      out[column + i] = static_cast<unsigned short>(words[i / 2] >> i % 2 * 16);
    }
  }

  const ForwardArguments& a_;
};

}  // namespace mate::cuda
