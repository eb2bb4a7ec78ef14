// Writes new keys and values into the cache, and rotates them and the queries.
#pragma once

#include "append_arguments.h"
#include "element.h"
#include "ptx/launch.h"
#include "sharer.h"

namespace mate::cuda {

/// Of a row, that a lane has at a time.
inline constexpr int lane_elements = 4;
/// The same of a warp.
inline constexpr int warp_elements = 32 * lane_elements;

/// The rotation of a row: none, unless the call rotates.
struct RowRotation {
  int columns = 0;  ///< that are rotated
  bool interleaved = false;
  ElementType type = ElementType::float32;
  const void* cos = nullptr;
  const void* sin = nullptr;

  RowRotation() = default;
  __device__ RowRotation(const Rotary& rotary, long long position) {
    if (!rotary.given()) return;
    const int row = clamp(position, 0, rotary.rows - 1);
    columns = rotary.dim;
    interleaved = rotary.interleaved;
    type = rotary.type;
    cos = rotary.cos_row(row);
    sin = rotary.sin_row(row);
  }
};

/// Elements of a row: each lane has every 32nd from its own on, in an order in which those that are rotated together
/// are neighbours, so that no other piece of the row is read, which may be stored by then. All of them, and what they
/// are rotated by, are on their way from memory at the same time, before any is stored. The program is short since most
/// of it is executed once, when no cache has it.
template <ElementType from, ElementType to>
class RowPiece {
 public:
  __device__ RowPiece(const void* source, int width, int first, const RowRotation& rotation)
      : first_(first + static_cast<int>(threadIdx.x % 32)), width_(width), rotation_(rotation) {
    const auto* const elements = static_cast<const Bits*>(source);
#pragma unroll
    for (int j = 0; j < lane_elements; ++j) bits_[j] = elements[column(min(place(j), width - 1))];
    if (rotation.columns == 0) return;
    if (bytes_of(rotation.type) == 4) {
      load_angles<unsigned>();
    } else if (bytes_of(rotation.type) == 2) {
      load_angles<unsigned short>();
    } else {
      load_angles<unsigned char>();
    }
  }

  /// Rotated, divided by `descale` where the type changes, and rounded once. All lanes of a warp call it.
  __device__ void store(void* target, float descale) const {
#pragma unroll
    for (int j = 0; j < lane_elements; ++j) {
      const bool is_rotated = place(j) < rotation_.columns;
      float value = widen_bits(bits_[j], from);
      if (rotation_.columns > 0) {
        const float turned = widen_bits(__shfl_xor_sync(~0U, bits_[j], 1), from) * widen_bits(sin_[j], rotation_.type);
        const float kept = value * widen_bits(cos_[j], rotation_.type);
        if (is_rotated) value = kept + (place(j) % 2 != 0 ? turned : -turned);
      }
      if (place(j) >= width_) continue;
      char* const element = static_cast<char*>(target) + column(place(j)) * bytes_of(to);
      if constexpr (from == to) {
        if (!is_rotated) {
          *reinterpret_cast<Bits*>(element) = bits_[j];
          continue;
        }
      } else {
        value /= descale;
      }
      narrow<to>(value, element);
    }
  }

 private:
  using Bits = typename BitsOf<bytes_of(from)>::Type;

  /// In that order, in which two elements that are rotated together, by one angle, have the numbers 2 i and 2 i + 1.
  __device__ int place(int j) const { return first_ + 32 * j; }
  __device__ int column(int place) const {
    const bool as_it_stands = rotation_.interleaved || place >= rotation_.columns;
    return as_it_stands ? place : place / 2 + (place % 2 != 0 ? rotation_.columns / 2 : 0);
  }

  template <typename AngleBits>
  __device__ void load_angles() {
#pragma unroll
    for (int j = 0; j < lane_elements; ++j) {
      const int angle = min(place(j), rotation_.columns - 1) / 2;
      cos_[j] = static_cast<const AngleBits*>(rotation_.cos)[angle];
      sin_[j] = static_cast<const AngleBits*>(rotation_.sin)[angle];
    }
  }

  int first_;
  int width_;
  RowRotation rotation_;
  Bits bits_[lane_elements];
  unsigned cos_[lane_elements];
  unsigned sin_[lane_elements];
};

/// Writes new key `t` of sequence b, and its value, of a key head.
template <AppendTypes types>
__device__ void append_row(const Problem& p, int b, const Sequence& sequence, int t, int head) {
  const Location to = locate_position(p.keys, sequence, static_cast<unsigned>(sequence.append_at) + t);
  if (to.slot < 0 || to.slot >= p.keys.slots) return;  // a page that there is not
  const int slot = p.keys.cu_seqlens_new.given() ? 0 : b;
  const long long row = static_cast<long long>(sequence.first_new) + t;
  const RowRotation rotation(p.rotary, static_cast<long long>(sequence.rotary_base) + t);
#pragma unroll 1
  for (int first = 0; first < max(p.head_dim, p.head_dim_v); first += warp_elements) {
    const RowPiece<types.added, types.key> key(p.k_new.at(slot, row, head), p.head_dim, first, rotation);
    const RowPiece<types.added, types.key> value(p.v_new.at(slot, row, head), p.head_dim_v, first, {});
    key.store(p.k.at(to.slot, to.row, head), p.k_descale.at(b, head));
    value.store(p.v.at(to.slot, to.row, head), p.v_descale.at(b, head));
  }
}

/// Writes row `query` of sequence b, of a query head, rotated, to where queries go.
template <AppendTypes types>
__device__ void rotate_row(const AppendArguments& a, int b, const Sequence& sequence, int query, int head) {
  const Problem& p = a.problem;
  const int slot = p.query_slot(b);
  const long long row = static_cast<long long>(sequence.first_q) + query;
  const RowRotation rotation(p.rotary,
                             static_cast<long long>(sequence.rotary_base) + (p.rotary.queries_advance ? query : 0));
#pragma unroll 1
  for (int first = 0; first < p.head_dim; first += warp_elements) {
    const RowPiece<types.query, types.query> piece(p.q.at(slot, row, head), p.head_dim, first, rotation);
    piece.store(a.rotated_q.at(slot, row, head), 1);
  }
}

/// Where a row of a tensor stands: in which sequence, and as which of its rows.
struct RowOfSequence {
  int b;
  int row;
};

/// Of `rows_of_each` rows for each sequence; or, where they are packed, of the last sequence that begins at or before
/// it, if none begins before another that it comes after: all lanes of a warp look for that together. The row may be
/// none of those that the sequence has.
__device__ inline RowOfSequence locate_row(IntVector cu_seqlens, int batch, int rows_of_each, int row) {
  if (!cu_seqlens.given()) {
    const int b = divide(row, rows_of_each);
    return {b, row - b * rows_of_each};
  }
  int first = 0;
#pragma unroll 1
  for (int count = batch; count > 1;) {
    const int distance = divide(count - 1, 32) + 1;
    const int ahead = static_cast<int>(threadIdx.x % 32) * distance;
    const unsigned begun = __ballot_sync(~0U, ahead < count && cu_seqlens[first + ahead] <= row);
    const int passed = begun == 0 ? 0 : (31 - __clz(begun)) * distance;
    first += passed;
    count = min(distance, count - passed);
  }
  return {first, row - max(cu_seqlens[first], 0)};
}

/// The warps of all blocks share the heads, and the rows of each.
template <AppendTypes types>
__device__ void append(const AppendArguments& a) {
  ptx::begin_overlapped();
  const Problem& p = a.problem;
  const int warps = blockDim.x / 32;
  const Sharer warp{static_cast<int>(blockIdx.x * warps + threadIdx.x / 32), static_cast<int>(gridDim.x * warps)};
  warp.share(p.heads_k + (p.rotary.given() ? p.heads_q : 0), [&](int head, Sharer of_head) {
    const bool is_key = head < p.heads_k;
    const IntVector cu_seqlens = is_key ? p.keys.cu_seqlens_new : p.queries.cu_seqlens;
    const int rows_of_each = is_key ? p.keys.new_rows : p.queries.rows;
    const unsigned rows = cu_seqlens.given() ? rows_of_each : rows_of_each * p.batch;
#pragma unroll 1
    for (unsigned row = of_head.number; row < rows; row += of_head.count) {
      const RowOfSequence of = locate_row(cu_seqlens, p.batch, rows_of_each, static_cast<int>(row));
      const Sequence sequence = p.sequence(of.b);
      if (of.row < 0 || of.row >= (is_key ? sequence.new_keys : sequence.lengths.sq)) continue;
      if (is_key) {
        append_row<types>(p, of.b, sequence, of.row, head);
      } else {
        rotate_row<types>(a, of.b, sequence, of.row, head - p.heads_k);
      }
    }
  });
}

}  // namespace mate::cuda
