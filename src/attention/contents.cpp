#include "contents.h"

#include <algorithm>
#include <cstdlib>
#include <string_view>
#include <tuple>
#include <vector>

#include "check.h"

namespace mate {
namespace {

void verify_offsets(const char* name, const IntVector& offsets, int batch, int rows) {
  if (!offsets.given()) return;
  require(offsets[0] >= 0, name, " must not be negative, got ", offsets[0], " at 0");
  for (int b = 0; b < batch; ++b) {
    require(offsets[b + 1] >= offsets[b], name, " must not decrease, got ", offsets[b], " then ", offsets[b + 1],
            " at ", b + 1);
  }
  require(offsets[batch] <= rows, name, " must end within the ", rows, " rows of its tensor, got ", offsets[batch]);
}

void verify_range(const char* name, const IntVector& values, int b, std::int64_t low, std::int64_t high,
                  const char* what) {
  if (!values.given()) return;
  require(values[b] >= low && values[b] <= high, name, " must be from ", low, " to ", high, " (", what, "), got ",
          values[b], " for sequence ", b);
}

void verify_pages(const KeyLayout& keys, const Sequence& sequence, int b, std::int64_t begin, std::int64_t end) {
  if (begin >= end) return;
  const int* row = keys.page_table + sequence.cache_row * keys.page_table_stride;
  for (std::int64_t i = begin / keys.rows; i <= (end - 1) / keys.rows; ++i) {
    require(row[i] >= 0 && row[i] < keys.slots, "page_table must hold pages from 0 to ", keys.slots - 1, ", got ",
            row[i], " at ", i, " for sequence ", b);
  }
}

/// Rows of a slot that a sequence appends to.
struct Appended {
  std::int64_t slot, begin, end;
  int sequence;

  bool operator<(const Appended& other) const {
    return std::tie(slot, begin, end) < std::tie(other.slot, other.begin, other.end);
  }
};

void verify_appended(const Problem& problem, const ArgumentNames& names) {
  const KeyLayout& keys = problem.keys;
  std::vector<Appended> appended;
  for (int b = 0; b < problem.batch; ++b) {
    const Sequence sequence = problem.sequence(b);
    std::int64_t at = sequence.append_at;
    const std::int64_t end = at + sequence.new_keys;
    while (at < end) {
      const Location first = locate_position(keys, sequence, static_cast<unsigned>(at));
      const std::int64_t count = std::min<std::int64_t>(end - at, keys.rows - first.row);
      appended.push_back({first.slot, first.row, first.row + count, b});
      at += count;
    }
  }
  std::sort(appended.begin(), appended.end());
  for (std::size_t i = 1; i < appended.size(); ++i) {
    const Appended& a = appended[i - 1];
    const Appended& b = appended[i];
    require(a.slot != b.slot || a.end <= b.begin, names.k_new, " must not be appended twice to one place of ", names.k,
            ": sequences ", a.sequence, " and ", b.sequence, " share row ", b.begin, " of ",
            keys.paged() ? "page " : "batch entry ", a.slot);
  }
}

void verify_rotary(const Problem& problem) {
  for (int b = 0; b < problem.batch; ++b) {
    const Sequence sequence = problem.sequence(b);
    const int queries = problem.rotary.queries_advance ? sequence.lengths.sq : std::min(sequence.lengths.sq, 1);
    const std::int64_t positions = std::max(sequence.new_keys, queries);
    if (positions == 0) continue;
    require(sequence.rotary_base >= 0, "rotary_seqlens must not be negative, got ", sequence.rotary_base,
            " for sequence ", b);
    const std::int64_t last = sequence.rotary_base + positions - 1;
    require(last < problem.rotary.rows, "rotary_cos must reach position ", last, " of sequence ", b, ", got ",
            problem.rotary.rows, " positions");
  }
}

}  // namespace

bool checks_requested() {
  const char* value = std::getenv("MATE_CHECK");
  return value != nullptr && std::string_view(value) == "1";
}

void verify_contents(const Problem& problem, const ArgumentNames& names) {
  const KeyLayout& keys = problem.keys;
  verify_offsets("cu_seqlens_q", problem.queries.cu_seqlens, problem.batch, problem.queries.rows);
  verify_offsets("cu_seqlens_k", keys.cu_seqlens, problem.batch, keys.rows);
  verify_offsets("cu_seqlens_k_new", keys.cu_seqlens_new, problem.batch, keys.new_rows);
  for (int b = 0; b < problem.batch; ++b) {
    const int q_capacity = problem.ragged_queries() ? problem.queries.cu_seqlens[b + 1] - problem.queries.cu_seqlens[b]
                                                    : problem.queries.rows;
    verify_range("seqused_q", problem.queries.seqused, b, 0, q_capacity, "the rows of q");
    const int capacity = key_capacity(keys, b);
    verify_range(names.seqused_k, keys.seqused, b, 0, capacity, "the rows there are");
    const int used = keys.seqused.given() ? keys.seqused[b] : capacity;
    verify_range("cache_leftpad", keys.leftpad, b, 0, used, "the keys in use");
    verify_range("cache_batch_idx", keys.batch_index, b, 0,
                 std::int64_t{keys.paged() ? keys.page_rows : keys.slots} - 1, "the rows there are");
    if (problem.mask.cp_world > 1) verify_range("cp_tot_seqused_k", keys.cp_total, b, 0, max_length, "a length");
    if (keys.appends) {
      const std::int64_t count =
          keys.cu_seqlens_new.given() ? keys.cu_seqlens_new[b + 1] - keys.cu_seqlens_new[b] : keys.new_rows;
      require(used + count <= capacity, names.k_new, " must fit the cache: sequence ", b, " has ", used, " of ",
              capacity, " rows in use, and ", count, " are appended");
    }
    const Sequence sequence = problem.sequence(b);
    require(sequence.lengths.sq <= problem.max_seqlen_q, "max_seqlen_q must be at least ", sequence.lengths.sq,
            ", the length of sequence ", b, ", got ", problem.max_seqlen_q);
    require(sequence.lengths.sk <= problem.max_seqlen_k, "max_seqlen_k must be at least ", sequence.lengths.sk,
            ", the length of sequence ", b, ", got ", problem.max_seqlen_k);
    if (keys.paged()) {
      // A sequence without queries reads no page, and needs those that it appends to.
      const std::int64_t end = std::int64_t{sequence.first_k} + sequence.lengths.sk;
      verify_pages(keys, sequence, b, sequence.lengths.sq > 0 ? sequence.first_k : end - sequence.new_keys, end);
    }
  }
  if (keys.appends) verify_appended(problem, names);
  if (problem.rotary.given() && checks_requested()) verify_rotary(problem);
}

}  // namespace mate
