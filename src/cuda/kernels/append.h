// Writes new keys and values into the cache, and rotates them and the queries.
#pragma once

#include "append_arguments.h"
#include "element.h"
#include "ptx/launch.h"

namespace mate::cuda {

/// Of a row, that a lane has at a time.
inline constexpr int lane_elements = 4;
/// Columns of a row that a warp has at a time.
inline constexpr int warp_columns = 32 * lane_elements;

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

/// Columns of a row: each lane has every 32nd from its own on. All of them, and what they are rotated by, are on their
/// way from memory at the same time, before any is stored. The program is short since most of it is executed once, when
/// no cache has it.
template <ElementType from, ElementType to>
class RowPiece {
 public:
  __device__ RowPiece(const void* source, int width, int first, const RowRotation& rotation)
      : first_(first + static_cast<int>(threadIdx.x % 32)), width_(width), rotation_(rotation) {
    const auto* const elements = static_cast<const Bits*>(source);
#pragma unroll
    for (int j = 0; j < lane_elements; ++j) bits_[j] = elements[min(column(j), width - 1)];
    if (rotation.columns == 0) return;
#pragma unroll
    for (int j = 0; j < lane_elements; ++j) {
      const int at = rotated_column(j);
      partners_[j] = elements[rotation.interleaved ? at ^ 1 : is_second(at) ? at - half() : at + half()];
    }
    if (bytes_of(rotation.type) == 4) {
      load_angles<unsigned>();
    } else if (bytes_of(rotation.type) == 2) {
      load_angles<unsigned short>();
    } else {
      load_angles<unsigned char>();
    }
  }

  /// Rotated, divided by `descale` where the type changes, and rounded once.
  __device__ void store(void* target, float descale) const {
#pragma unroll
    for (int j = 0; j < lane_elements; ++j) {
      if (column(j) >= width_) return;
      char* const element = static_cast<char*>(target) + column(j) * bytes_of(to);
      float value = widen_bits(bits_[j], from);
      if (column(j) < rotation_.columns) {
        const float turned = widen_bits(partners_[j], from) * widen_bits(sin_[j], rotation_.type);
        value = value * widen_bits(cos_[j], rotation_.type) + (is_second(column(j)) ? turned : -turned);
      } else if constexpr (from == to) {
        *reinterpret_cast<Bits*>(element) = bits_[j];
        continue;
      }
      if constexpr (from != to) value /= descale;
      narrow<to>(value, element);
    }
  }

 private:
  using Bits = typename BitsOf<bytes_of(from)>::Type;

  __device__ int column(int j) const { return first_ + 32 * j; }
  /// The same where it is rotated; else one that is.
  __device__ int rotated_column(int j) const { return min(column(j), rotation_.columns - 1); }
  __device__ int half() const { return rotation_.columns / 2; }
  /// Of the two columns that are rotated together.
  __device__ bool is_second(int column) const { return rotation_.interleaved ? column % 2 != 0 : column >= half(); }

  template <typename AngleBits>
  __device__ void load_angles() {
#pragma unroll
    for (int j = 0; j < lane_elements; ++j) {
      const int at = rotated_column(j);
      const int angle = rotation_.interleaved ? at / 2 : is_second(at) ? at - half() : at;
      cos_[j] = static_cast<const AngleBits*>(rotation_.cos)[angle];
      sin_[j] = static_cast<const AngleBits*>(rotation_.sin)[angle];
    }
  }

  int first_;
  int width_;
  RowRotation rotation_;
  Bits bits_[lane_elements];
  Bits partners_[lane_elements];  ///< what they are rotated with
  unsigned cos_[lane_elements];
  unsigned sin_[lane_elements];
};

/// Of those that share some work: warps, or some of them.
struct Sharer {
  int number;
  int count;

  /// Shares `parts` parts: each is one sharer's, or several share it. Calls take(part, sharer of the part).
  template <typename Take>
  __device__ void share(int parts, const Take& take) const {
    const int of_part = max(divide(count, parts), 1);
    const int member = divide(number, parts);
    if (member >= of_part) return;
#pragma unroll 1
    for (int part = number - member * parts; part < parts; part += count) take(part, Sharer{member, of_part});
  }
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
  for (int column = 0; column < max(p.head_dim, p.head_dim_v); column += warp_columns) {
    const RowPiece<types.added, types.key> key(p.k_new.at(slot, row, head), p.head_dim, column, rotation);
    const RowPiece<types.added, types.key> value(p.v_new.at(slot, row, head), p.head_dim_v, column, {});
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
  for (int column = 0; column < p.head_dim; column += warp_columns) {
    const RowPiece<types.query, types.query> piece(p.q.at(slot, row, head), p.head_dim, column, rotation);
    piece.store(a.rotated_q.at(slot, row, head), 1);
  }
}

/// The warps of all blocks share the sequences, and the heads and rows of each.
template <AppendTypes types>
__device__ void append(const AppendArguments& a) {
  ptx::begin_overlapped();
  const Problem& p = a.problem;
  const int warps = blockDim.x / 32;
  const Sharer warp{static_cast<int>(blockIdx.x * warps + threadIdx.x / 32), static_cast<int>(gridDim.x * warps)};
  warp.share(p.batch, [&](int b, Sharer of_sequence) {
    const Sequence sequence = p.sequence(b);
    const int heads_q = p.rotary.given() ? p.heads_q : 0;
    of_sequence.share(p.heads_k + heads_q, [&](int head, Sharer of_head) {
      const bool is_key = head < p.heads_k;
      const int rows = is_key ? sequence.new_keys : sequence.lengths.sq;
#pragma unroll 1
      for (int row = of_head.number; row < rows; row += of_head.count) {
        if (is_key) {
          append_row<types>(p, b, sequence, row, head);
        } else {
          rotate_row<types>(a, b, sequence, row, head - p.heads_k);
        }
      }
    });
  });
}

}  // namespace mate::cuda
