// Where a sequence lies: its lengths, its query rows, its keys (ragged, padded, paged, left-padded, appended).
//
// Shared with device code: includes nothing but its sibling, which includes nothing.
#pragma once

#include "attention/visibility.h"

namespace mate {

/// A one-dimensional int32 tensor; data is null where the argument is not given.
struct IntVector {
  const int* data = nullptr;
  long long stride = 1;

  constexpr bool given() const { return data != nullptr; }
#ifdef __CUDA_ARCH__
  // Past the L1 cache: what lay there before the kernel's turn came is not to be found again.
  __device__ int operator[](long long i) const { return __ldcg(data + i * stride); }
#else
  constexpr int operator[](long long i) const { return data[i * stride]; }
#endif
};

/// How the query rows of the batch are stored.
struct QueryLayout {
  int rows = 0;          ///< rows of one sequence; of all together when ragged
  IntVector cu_seqlens;  ///< (b + 1,): ragged
  IntVector seqused;     ///< (b,): only the first of a sequence's rows are used
};

/// How the keys and values of the batch are stored.
struct KeyLayout {
  int rows = 0;           ///< rows of one sequence; of all together when ragged; of one page when paged
  int slots = 0;          ///< sequences in the cache, or pages
  IntVector cu_seqlens;   ///< (b + 1,): ragged
  IntVector seqused;      ///< (b,): keys in use, counted from the start of the cache row, without what is appended
  IntVector batch_index;  ///< (b,): the row of the cache, or of the page table, that a sequence reads
  IntVector leftpad;      ///< (b,): where in its cache row a sequence starts
  const int* page_table = nullptr;  ///< (page_rows, pages of a sequence): paged
  long long page_table_stride = 0;
  int page_rows = 0;
  int table_capacity = 0;  ///< keys that a row of it has room for: see table_capacity_of()
  bool appends = false;
  int new_rows = 0;          ///< new keys of one sequence; of all together when packed
  IntVector cu_seqlens_new;  ///< (b + 1,): new keys are packed
  IntVector rotary_seqlens;  ///< (b,): position of the first new key; absent: seqused
  IntVector cp_total;        ///< (b,): keys of all ranks, appended ones included

  constexpr bool paged() const { return page_table != nullptr; }
};

/// One sequence of the batch.
struct Sequence {
  Lengths lengths;         ///< appended keys included
  int query_capacity = 0;  ///< query rows that it has, the first lengths.sq of which are used
  int first_q = 0;         ///< row of q where it starts: in the whole tensor when ragged, else in its batch entry
  int cache_row = 0;       ///< the batch entry of the cache, or the row of the page table; 0 when ragged
  int first_k = 0;         ///< position of key 0 in the cache row, or row of the ragged tensor
  int append_at = 0;       ///< position in the cache row of the first new key
  int first_new = 0;       ///< row of the new keys where its own start
  int new_keys = 0;        ///< keys that are appended
  int rotary_base = 0;     ///< position, for the rotation, of the first new key
};

/// Whether two sequences have the same queries and keys at the same places, whichever of the keys are new.
constexpr bool is_same_place(const Sequence& a, const Sequence& b) {
  return a.lengths.sq == b.lengths.sq && a.lengths.sk == b.lengths.sk && a.lengths.total == b.lengths.total &&
         a.query_capacity == b.query_capacity && a.first_q == b.first_q && a.cache_row == b.cache_row &&
         a.first_k == b.first_k;
}

/// Where a key's row stands: in which slot (batch entry or page), and which row of it.
struct Location {
  long long slot = 0;
  long long row = 0;
};

/// The query rows that a sequence has, used or not.
struct QueryRows {
  int first = 0;  ///< in the whole tensor when ragged, else in its batch entry
  int count = 0;
};
constexpr QueryRows query_rows(const QueryLayout& queries, int b) {
  if (!queries.cu_seqlens.given()) return {0, queries.rows};
  const int begin = clamp(queries.cu_seqlens[b], 0, queries.rows);
  return {begin, clamp(static_cast<long long>(queries.cu_seqlens[b + 1]) - begin, 0, queries.rows - begin)};
}

/// How many of `capacity` rows are used.
constexpr int used_queries(const QueryLayout& queries, int b, int capacity) {
  return queries.seqused.given() ? clamp(queries.seqused[b], 0, capacity) : capacity;
}

/// How many keys so many pages have room for, as far as they are counted.
constexpr int table_capacity_of(long long pages, int page_size) { return clamp(pages * page_size, 0, max_length); }

/// How many keys a sequence has room for.
constexpr int key_capacity(const KeyLayout& keys, int b) {
  if (keys.paged()) return keys.table_capacity;
  if (!keys.cu_seqlens.given()) return keys.rows;
  const int begin = clamp(keys.cu_seqlens[b], 0, keys.rows);
  return clamp(static_cast<long long>(keys.cu_seqlens[b + 1]) - begin, 0, keys.rows - begin);
}

/// Sequence b. Whatever the lengths hold, nothing outside a tensor is pointed to: they are clamped.
constexpr Sequence locate_sequence(const QueryLayout& queries, const KeyLayout& keys, const Mask& mask, int b) {
  Sequence s;
  const QueryRows rows = query_rows(queries, b);
  s.first_q = rows.first;
  s.query_capacity = rows.count;
  s.lengths.sq = used_queries(queries, b, rows.count);

  // A cache row that there is not holds no keys.
  const int cache_rows = keys.paged() ? keys.page_rows : keys.slots;
  s.cache_row = keys.batch_index.given() ? keys.batch_index[b] : keys.cu_seqlens.given() ? 0 : b;
  const bool exists = s.cache_row >= 0 && s.cache_row < cache_rows;
  if (!exists) s.cache_row = 0;

  const int capacity = exists ? key_capacity(keys, b) : 0;
  const int used = keys.seqused.given() ? clamp(keys.seqused[b], 0, capacity) : capacity;
  const int leftpad = keys.leftpad.given() ? clamp(keys.leftpad[b], 0, used) : 0;
  s.first_k = leftpad + (keys.cu_seqlens.given() ? clamp(keys.cu_seqlens[b], 0, keys.rows) : 0);
  if (keys.appends) {
    s.append_at = used;
    s.new_keys = keys.new_rows;
    if (keys.cu_seqlens_new.given()) {
      s.first_new = clamp(keys.cu_seqlens_new[b], 0, keys.new_rows);
      s.new_keys =
          clamp(static_cast<long long>(keys.cu_seqlens_new[b + 1]) - s.first_new, 0, keys.new_rows - s.first_new);
    }
    s.new_keys = clamp(s.new_keys, 0, static_cast<long long>(capacity) - used);
    s.rotary_base = keys.rotary_seqlens.given() ? keys.rotary_seqlens[b] : used;
  }
  s.lengths.sk = used - leftpad + s.new_keys;
  s.lengths.total = mask.cp_world > 1 ? clamp(keys.cp_total[b], 0, max_length) : s.lengths.sk;
  return s;
}

/// Page `index` of a sequence.
constexpr long long page_of(const KeyLayout& keys, const Sequence& sequence, long long index) {
  return keys.page_table[sequence.cache_row * keys.page_table_stride + index];
}

/// Where the row at `position` of a sequence's cache row stands, where rows are paged.
constexpr Location locate_in_pages(const KeyLayout& keys, const Sequence& sequence, unsigned position) {
  const unsigned page = position / static_cast<unsigned>(keys.rows);
  return {page_of(keys, sequence, page), position - page * static_cast<unsigned>(keys.rows)};
}

/// The same of any rows; of ragged ones the position is that in the whole tensor.
constexpr Location locate_position(const KeyLayout& keys, const Sequence& sequence, unsigned position) {
  return keys.paged() ? locate_in_pages(keys, sequence, position) : Location{sequence.cache_row, position};
}

/// Where key j of a sequence stands.
constexpr Location locate_key(const KeyLayout& keys, const Sequence& sequence, int j) {
  return locate_position(keys, sequence, static_cast<unsigned>(sequence.first_k) + static_cast<unsigned>(j));
}

}  // namespace mate
