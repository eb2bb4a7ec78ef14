// What becomes of a tile's sums: rows of out and their log-sum-exp, or a part of them, merged with the others by
// whoever is done last, by another launch (merge_parts.h), or by all who have parts, blocks of one cluster.
#pragma once

#include "forward_shared.h"
#include "part_merger.h"
#include "ptx/cluster.h"
#include "ptx/global.h"
#include "store.h"

namespace mate::cuda {

/// Named barriers: 0 is __syncthreads, then come the turns of up to three consumers, or the warps of each of two
/// scorers and all of these (transposed.h), then the consumers of some rows by themselves, and all consumers.
inline constexpr int first_turn_barrier = 1;
inline constexpr int first_row_group_barrier = 4;
inline constexpr int all_consumers_barrier = 7;

/// Used by all threads of the consumers of some rows together, each of which has sums of columns of its own.
template <ForwardVariant variant>
class ResultWriter : PartMerger<variant.types.out, variant.head_dim_v> {
 public:
  static constexpr int columns = variant.consumer_columns();
  using Sums = float (&)[columns / 2];

  /// Of consumer `consumer`.
  __device__ ResultWriter(const ForwardArguments& arguments, int consumer, ForwardShared<variant>& shared)
      : PartMerger<variant.types.out, variant.head_dim_v>(arguments), consumer_(consumer), shared_(shared) {}

  /// Of a tile, or the part of it that begins with block `begin`, whose keys have all been seen: the last of the parts
  /// that this block of threads takes comes first. Sums of values are multiplied by `value_factor`.
  __device__ void write(const TileWork& work, int begin, Sums sums, const OnlineSoftmax& softmax,
                        float value_factor) const {
    const Problem& p = a_.problem;
    if constexpr (variant.splits) {
      if (work.parts.count > 1) {
        store_part(work, work.part_at(a_.cut, begin), sums, softmax);
        if (begin == work.blocks.begin) end_parts(work, value_factor);
        return;
      }
    }
    if constexpr (variant.merges_in_cluster) {
      store_part_for_cluster(sums, softmax);
      return;
    }
    // Two lanes for each row of the warp find where it goes; those that hold its sums ask the first of them.
    const int lane = threadIdx.x % 32;
    const RowPlace place = place_of(a_, work, group() * 64 + accumulator_row_of_warp(lane % 16));
    float shares[rows_of_thread];
    float lses[rows_of_thread];
    finish(softmax, place, work.used, shares, lses);
    const int slot = p.query_slot(work.sequence);
    const long long row = row_in_tensor(work, place);
    const bool exists = place.query < work.place.query_capacity;
    unsigned short* out = p.out.at<unsigned short>(slot, row, place.head) + first_column();
    if (!exists) out = nullptr;
    unsigned short* outs[rows_of_thread];
#pragma unroll
    for (int i = 0; i < rows_of_thread; ++i) outs[i] = from_lane(out, lane / 4 + 8 * i);
    if (__any_sync(~0U, shares[0] == 0 || shares[1] == 0)) {
#pragma unroll
      for (int i = 0; i < rows_of_thread; ++i) clear_row_if<columns>(sums, i, shares[i] == 0);
    }
#pragma unroll
    for (float& share : shares) share *= share == 0 ? 1 : value_factor;
    store_rows<variant.types.out, columns>(sums, shares, outs, p.head_dim_v - first_column(), a_.wide_rows);
    // Back to the lanes that know where.
    const float of_upper = __shfl_sync(~0U, lses[0], 4 * (lane % 8));
    const float of_lower = __shfl_sync(~0U, lses[1], 4 * (lane % 8));
    if (lane < 16 && exists && p.lse.data != nullptr && first_column() == 0) {
      p.lse.at(slot, place.head, row) = lane < 8 ? of_upper : of_lower;
    }
  }

  /// The same of a tile of which each warp of stream.h has seen some of the keys: the sums of row r are
  /// read(warp, r, column), four at a time, and have weight_of(warp, r).
  template <typename WeightOf, typename Read>
  __device__ void write_merged(const TileWork& work, int begin, float value_factor, const WeightOf& weight_of,
                               const Read& read) const {
    if constexpr (variant.splits) {
      if (work.parts.count > 1) {
        merge_to_part(work, work.part_at(a_.cut, begin), weight_of, read);
        if (begin == work.blocks.begin) end_parts(work, value_factor);
        return;
      }
    }
    for_own_rows([&](int row) {
      return Base::template merge_row_of<variant.stream_warps()>(
          work, row, variant.stream_warps(), value_factor, [&](int warp) { return weight_of(warp, row); },
          [&](int warp, int column) { return read(warp, row, column); });
    });
  }

  /// The same of a tile of transposed.h, where each thread of the first ones has the weight of a row, and a lane has
  /// sums of columns for two of every eight rows: sums_of(row_tile, i, j) is a float4 of those of row i of two from
  /// column `first` + 4 j on, of so many columns.
  template <int count, typename SumsOf>
  __device__ void write_transposed(const TileWork& work, int begin, float value_factor, RowTarget* targets,
                                   const PartWeight& weight, int first, const SumsOf& sums_of) const {
    const bool is_part = variant.splits && work.parts.count > 1;
    await_others();  // they have done with the targets of the part before
    if (thread() < rows) targets[thread()] = target_of(work, is_part, begin, thread(), weight);
    await_others();
#pragma unroll
    for (int row_tile = 0; row_tile < rows / 8; ++row_tile) {
#pragma unroll
      for (int i = 0; i < rows_of_thread; ++i) {
        ptx::forget_shared_memory();  // registers are too few to look ahead
        const RowTarget target = targets[8 * row_tile + accumulator_column() + i];
        if (target.row == nullptr) continue;
#pragma unroll
        for (int j = 0; j < count / 4; ++j) {
          const int column = first + 4 * j;
          if (column >= a_.problem.head_dim_v) continue;
          const float4 sums = sums_of(row_tile, i, j);
          if (is_part) {
            *reinterpret_cast<float4*>(static_cast<float*>(target.row) + column) = sums;
          } else {
            float values[4] = {sums.x, sums.y, sums.z, sums.w};
#pragma unroll
            for (float& value : values) value = target.share == 0 ? 0 : value * target.share;
            store_columns(static_cast<unsigned short*>(target.row), column, values, value_factor);
          }
        }
      }
    }
    if constexpr (variant.splits) {
      if (is_part && begin == work.blocks.begin) end_parts(work, value_factor);
    }
  }

  /// Merges the parts of a tile that the blocks of this cluster have stored: each block some rows.
  __device__ void merge_in_cluster(const TileWork& work, float value_factor) const {
    if (work.sequence < 0) return;
    const ClusterPart<variant>& part = shared_.part();
    const int parts = work.parts.count;
    constexpr int lines_at_once = 2;  // of more, so much more code takes longer to arrive than it spares
    merge_many<lines_at_once>(
        work, value_factor, {thread() / 32 * parts + ptx::block_of_cluster(), parts * warps},
        [&](int block, int row) {
          const float2 weight = ptx::load_from(block, part.weights[row]);
          return PartWeight{weight.x, weight.y};
        },
        [&](int block, int row, int column) {
          return ptx::load_from(block, *reinterpret_cast<const float4*>(&part.sums[row][column]));
        });
  }

  /// Waits for the other threads of the rows' consumers.
  __device__ void await_others() const { ptx::barrier_sync(first_row_group_barrier + group(), threads); }

  /// Of those of the same rows.
  __device__ int thread() const {
    return (variant.row_groups() == 1 ? consumer_ * 128 : 0) + static_cast<int>(threadIdx.x % 128);
  }
  /// The first of a consumer's columns.
  __device__ int first_column() const { return variant.wide ? consumer_ * columns : 0; }

 private:
  using Base = PartMerger<variant.types.out, variant.head_dim_v>;
  using Base::a_;
  using Base::partial_row;
  using Base::store_columns;
  using Base::sums_of;
  using Base::sums_of_part;
  using Base::weight_of;
  using Base::weight_of_part;

  static constexpr int threads = 128 * variant.consumers_of_row();  // of the consumers of a row
  static constexpr int warps = threads / 32;
  static constexpr int rows = variant.tile_rows() / variant.row_groups();  // that they have
  __device__ int first_row() const { return group() * rows; }

  /// Its group of rows.
  __device__ int group() const { return variant.row_groups() == 1 ? 0 : consumer_; }
  /// Whether this thread has the first column of its rows.
  __device__ bool has_first_column() const { return first_column() + accumulator_column() == 0; }

  /// Ends the sums of this thread's rows: what they are to be multiplied by, and the log-sum-exp. Row r of the warp
  /// has the place that lane r says, and is not computed from query `used` on.
  __device__ void finish(const OnlineSoftmax& softmax, const RowPlace& place, int used, float (&shares)[rows_of_thread],
                         float (&lses)[rows_of_thread]) const {
    const int first = threadIdx.x % 32 / 4;
#pragma unroll
    for (int i = 0; i < rows_of_thread; ++i) lses[i] = softmax.finish(i, shares[i]);
    if (a_.problem.sink.given()) {
      const float sink = sink_of(a_.problem, place.head);
#pragma unroll
      for (int i = 0; i < rows_of_thread; ++i) {
        lses[i] = add_sink(lses[i], __shfl_sync(~0U, sink, first + 8 * i), shares[i]);
      }
    }
    const unsigned computed = __ballot_sync(~0U, place.query < used);
#pragma unroll
    for (int i = 0; i < rows_of_thread; ++i) {
      if ((computed >> (first + 8 * i) & 1) != 0) continue;
      shares[i] = 0;
      lses[i] = -infinity();
    }
  }

  /// Ends a row of a tile, or of a part of it, that has such weights.
  __device__ RowTarget target_of(const TileWork& work, bool is_part, int begin, int row,
                                 const PartWeight& weight) const {
    const Problem& p = a_.problem;
    const RowPlace place = place_of(a_, work, row);
    const bool computed = place.query < work.used;
    RowTarget target;
    if (is_part) {
      if (!computed) return target;
      const long long at = partial_row(work, work.part_at(a_.cut, begin), row);
      *weight_of_part(at) = make_float2(weight.max, weight.sum);
      target.row = sums_of_part(at);
    } else if (place.query < work.place.query_capacity) {
      const int slot = p.query_slot(work.sequence);
      const long long row_of_out = row_in_tensor(work, place);
      const float lse = computed ? Base::finish(weight, place.head, target.share) : -infinity();
      if (p.lse.data != nullptr) p.lse.at(slot, place.head, row_of_out) = lse;
      target.row = p.out.at<unsigned short>(slot, row_of_out, place.head);
    }
    return target;
  }

  /// Where keys and values were, which other consumers may yet multiply.
  __device__ void store_part_for_cluster(Sums sums, const OnlineSoftmax& softmax) const {
    ptx::barrier_sync(all_consumers_barrier, 128 * variant.warpgroups);
    ClusterPart<variant>& part = shared_.part();
#pragma unroll
    for (int i = 0; i < rows_of_thread; ++i) {
      const int row = group() * 64 + accumulator_row(i);
      const float2 weight = softmax.partial(i);
      if (has_first_column()) part.weights[row] = weight;
      float* const target = part.sums[row] + accumulator_column();
#pragma unroll
      for (int j = 0; j < columns / 8; ++j) {
        *reinterpret_cast<float2*>(target + 8 * j) = make_float2(sums[4 * j + 2 * i], sums[4 * j + 2 * i + 1]);
      }
    }
  }

  __device__ void store_part(const TileWork& work, int part, Sums sums, const OnlineSoftmax& softmax) const {
#pragma unroll
    for (int i = 0; i < rows_of_thread; ++i) {
      const int row = group() * 64 + accumulator_row(i);
      const float2 weight = softmax.partial(i);
      if (place_of(a_, work, row).query >= work.used) continue;
      const long long at = partial_row(work, part, row);
      float* const target = sums_of_part(at) + first_column() + accumulator_column();
#pragma unroll
      for (int j = 0; j < columns / 8; ++j) {
        *reinterpret_cast<float2*>(target + 8 * j) = make_float2(sums[4 * j + 2 * i], sums[4 * j + 2 * i + 1]);
      }
      if (has_first_column()) *weight_of_part(at) = weight;
    }
  }

  /// Tells that this block's parts of the rows are done. Whether they were the last.
  __device__ bool are_all_done(const TileWork& work) const {
    await_others();
    const int others = work.parts.count - work.parts.taken;
    if (others == 0) return true;
    if (thread() == 0) {
      int* const done = a_.counters + work.parts.counter * variant.row_groups() + group();
      const bool last = ptx::add_and_synchronize(done, work.parts.taken) == others;
      if (last) *done = 0;
      shared_.is_last[group()] = last;
    }
    await_others();
    return shared_.is_last[group()];
  }

  /// The warps of the rows' consumers merge their parts.
  __device__ void merge_parts(const TileWork& work, float value_factor) const {
    if constexpr (variant.stream()) {
      for_own_rows([&](int row) { return Base::template merge_row_of<most_at_once>(work, row, value_factor); });
    } else {
      // As registers allow.
      constexpr int lines_at_once = variant.transposed() ? 2 : variant.moves_registers() ? 4 : 8;
      // Its number is not worth a register all along.
      merge_many<lines_at_once>(
          work, value_factor, {ptx::known_only_here(thread()) / 32, warps},
          [&](int part, int row) { return weight_of(work, part, row); },
          [&](int part, int row, int column) { return sums_of(work, part, row, column); });
    }
  }

  /// Calls merge(row) for this warp's rows, one of as many as there are warps, until it returns false.
  template <typename Merge>
  __device__ void for_own_rows(const Merge& merge) const {
#pragma unroll 1
    for (int row = first_row() + thread() / 32; row < first_row() + rows; row += warps) {
      if (!merge(row)) return;
    }
  }

  /// Merges parts where rows are many, which warps take in turns. Row r of a part
  /// has part_weight(part, r), and part_sums(part, r, column) from a column on, of so many lines at once.
  template <int lines_at_once, typename WeightOfPart, typename SumsOfPart>
  __device__ void merge_many(const TileWork& work, float value_factor, Sharer warp, const WeightOfPart& part_weight,
                             const SumsOfPart& part_sums) const {
    static_assert(rows <= 32 * warps);
    const Problem& p = a_.problem;
    const int slot = p.query_slot(work.sequence);
    const int first = first_row() + warp.number;
    const auto row = [&](int i) { return first + i * warp.count; };
    const int end = end_of_rows(work, work.used);
    merge_rows<lines_at_once>(
        end > first ? divide(end - first - 1, warp.count) + 1 : 0, work.parts.count, p.head_dim_v,
        [&](int i, int part) { return part_weight(part, row(i)); },
        [&](int i, int part, int column) { return part_sums(part, row(i), column); },
        [&](int i, PartWeight all) {
          const RowPlace place = place_of(a_, work, row(i));
          const long long row_of_out = row_in_tensor(work, place);
          MergedRow merged;
          const float lse = Base::finish(all, place.head, merged.share);
          if (p.lse.data != nullptr) p.lse.at(slot, place.head, row_of_out) = lse;
          merged.out = p.out.at<unsigned short>(slot, row_of_out, place.head);
          return merged;
        },
        [&](unsigned short* out, int column, float(&sums)[4]) { store_columns(out, column, sums, value_factor); });
    const int existing = end_of_rows(work, work.place.query_capacity);
#pragma unroll 1
    for (int i = max(end, first_row()) + warp.number; i < existing; i += warp.count) {
      const RowPlace place = place_of(a_, work, i);
      clear_row(p, slot, row_in_tensor(work, place), place.head, -infinity());
    }
  }

  /// Where the rows of queries before `query` end in this group.
  __device__ int end_of_rows(const TileWork& work, int query) const {
    const int before = (query - work.first_query) * a_.pack;
    return min(min(before, a_.rows_of_block), first_row() + rows);
  }

  /// When this block of threads has stored its parts of a tile. If others have parts of it too, another launch merges
  /// them, or whoever is done last; else this block does.
  __device__ void end_parts(const TileWork& work, float value_factor) const {
    if constexpr (variant.may_merge_apart()) {
      if (a_.parts.cut_tiles != nullptr && work.parts.count > work.parts.taken) {
        if (work.parts.first == 0 && group() == 0 && thread() == 0) {
          a_.parts.cut_tiles[work.parts.counter] = {work.sequence, work.unit,          work.first_query,
                                                    work.used,     work.place.first_q, work.place.query_capacity,
                                                    value_factor,  work.parts};
        }
        return;
      }
    }
    if (are_all_done(work)) merge_parts(work, value_factor);
  }

  /// Merges what each warp of stream.h has seen into a part.
  template <typename WeightOf, typename Read>
  __device__ void merge_to_part(const TileWork& work, int part, const WeightOf& weight_of, const Read& read) const {
#pragma unroll 1
    for (int row = first_row() + thread() / 32; row < first_row() + rows; row += warps) {
      if (place_of(a_, work, row).query >= work.used) continue;
      const long long at = partial_row(work, part, row);
      merge_row<float4, true, variant.stream_warps()>(
          variant.stream_warps(), a_.problem.head_dim_v, [&](int warp) { return weight_of(warp, row); },
          [&](int warp, int column) { return read(warp, row, column); },
          [&](PartWeight all) {
            if (first_lane()) *weight_of_part(at) = make_float2(all.max, all.sum);
            return 1.0F;
          },
          [&](int column, const float(&sums)[4]) {
            *reinterpret_cast<float4*>(sums_of_part(at) + column) = make_float4(sums[0], sums[1], sums[2], sums[3]);
          });
    }
  }

  int consumer_;
  ForwardShared<variant>& shared_;
};

}  // namespace mate::cuda
