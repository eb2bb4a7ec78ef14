// The normalised call: what is left of the arguments once they are checked and every default is filled in.
//
// Shared with device code: includes nothing but its siblings.
#pragma once

#include "attention/sequence.h"

namespace mate {

/// Head sizes of keys and of values go from 1 to this.
inline constexpr int max_head_dim = 512;

enum class ElementType { float32, float16, bfloat16, float8_e4m3 };

constexpr int bytes_of(ElementType type) {
  switch (type) {
    case ElementType::float32:
      return 4;
    case ElementType::float16:
    case ElementType::bfloat16:
      return 2;
    case ElementType::float8_e4m3:
      return 1;
  }
  return 0;
}

/// A tensor of rows: (slot, row, head, element), the elements of a row adjacent. A slot is a batch entry or a
/// page; a ragged tensor is one slot. Strides in elements. data is null where the argument is not given, and only
/// there: a given tensor without elements points somewhere too.
struct Rows {
  void* data = nullptr;
  ElementType type = ElementType::float32;
  long long slot_stride = 0;
  long long row_stride = 0;
  long long head_stride = 0;

  constexpr bool given() const { return data != nullptr; }
  void* at(long long slot, long long row, long long head) const {
    return static_cast<char*>(data) + offset(slot, row, head) * bytes_of(type);
  }
  /// The same where the elements' bits are known to be a T.
  template <typename T>
  T* at(long long slot, long long row, long long head) const {
    return static_cast<T*>(data) + offset(slot, row, head);
  }

 private:
  constexpr long long offset(long long slot, long long row, long long head) const {
    return slot * slot_stride + row * row_stride + head * head_stride;
  }
};

/// lse, float32: (slot, head, row). A ragged one is one slot.
struct LogSumExp {
  float* data = nullptr;
  long long slot_stride = 0;
  long long head_stride = 0;
  long long row_stride = 0;

  float& at(long long slot, long long head, long long row) const {
    return data[slot * slot_stride + head * head_stride + row * row_stride];
  }
};

/// A descale factor for each sequence and key head, 1 where absent.
struct Descale {
  const float* data = nullptr;
  long long batch_stride = 0;
  long long head_stride = 0;

  float at(long long b, long long head) const {
    return data == nullptr ? 1.0F : data[b * batch_stride + head * head_stride];
  }
};

/// The sink of each query head, of any floating type. data is null where there is none.
struct Sink {
  const void* data = nullptr;
  ElementType type = ElementType::float32;
  long long stride = 1;

  constexpr bool given() const { return data != nullptr; }
  const void* at(long long head) const { return static_cast<const char*>(data) + head * stride * bytes_of(type); }
};

/// The rotation of queries and appended keys.
struct Rotary {
  const void* cos = nullptr;  ///< (rows, dim / 2); null: no rotation
  const void* sin = nullptr;
  ElementType type = ElementType::float32;
  long long cos_stride = 0;
  long long sin_stride = 0;
  int rows = 0;
  int dim = 0;
  bool interleaved = true;
  bool queries_advance = false;  ///< query row i stands i positions after the first; else all stand at the first

  constexpr bool given() const { return cos != nullptr; }
  const void* cos_row(long long row) const { return static_cast<const char*>(cos) + row * cos_stride * bytes_of(type); }
  const void* sin_row(long long row) const { return static_cast<const char*>(sin) + row * sin_stride * bytes_of(type); }
};

/// What a call computes, on which memory. Absent optional parts are null.
struct Problem {
  int batch = 0;
  int heads_q = 0;
  int heads_k = 0;
  int head_dim = 0;    ///< d, of q and k
  int head_dim_v = 0;  ///< dv, of v, qv and out

  Rows q, qv, k, v, k_new, v_new, out;
  LogSumExp lse;
  QueryLayout queries;
  KeyLayout keys;
  Mask mask;
  int max_seqlen_q = max_length;  ///< no length exceeds them
  int max_seqlen_k = max_length;

  float softmax_scale = 1;
  float softcap = 0;  ///< 0: none
  Descale q_descale, k_descale, v_descale;
  Sink sink;
  Rotary rotary;

  // How the work is cut; nothing here changes a result beyond rounding.
  int num_splits = 0;  ///< 0: the backend decides
  int pack_gqa = -1;   ///< -1: the backend decides; else 0 or 1
  int sm_margin = 0;
  bool batch_invariant = false;
  IntVector scheduler_metadata;

  constexpr int group() const { return heads_k == 0 ? 1 : heads_q / heads_k; }
  constexpr bool ragged_queries() const { return queries.cu_seqlens.given(); }

  Sequence sequence(int b) const { return locate_sequence(queries, keys, mask, b); }
  /// The slot of q, qv, out and lse that sequence b lies in.
  int query_slot(int b) const { return ragged_queries() ? 0 : b; }
  int query_slots() const { return ragged_queries() ? 1 : batch; }
};

/// Partial results to be merged, and what they are merged to.
struct CombineProblem {
  int splits = 0;
  int batch = 0;
  int rows = 0;
  int heads = 0;
  int head_dim_v = 0;
  Rows partial;  ///< of the first split, float32
  long long partial_split_stride = 0;
  LogSumExp partial_lse;  ///< of the first split
  long long lse_split_stride = 0;
  Rows out;
  LogSumExp lse;  ///< data is null where it is not wanted
};

}  // namespace mate
