// Fetches rows of keys and values into the cache ahead of their use.
#pragma once

#include <array>
#include <cstdint>

#include "attention/visibility.h"

namespace mate::cpu {

/// The rows of the keys, or of the values, of one block: those of `columns`, for each head.
struct PrefetchRows {
  const char* const* rows = nullptr;  ///< (block_keys,): of the first head
  KeyRange columns;
  int heads = 0;
  std::int64_t head_step = 0;  ///< bytes
  int bytes = 0;               ///< of a row of one head
};

/// Runs ahead of what reads the keys, then the values, of block after block, key by key and each key head by head.
/// Pages lie anywhere, so the processor's own prefetching, which guesses addresses, would stop at the end of each.
class Prefetcher {
 public:
  /// The next block to be read, and the one after it.
  void enter(const PrefetchRows& keys, const PrefetchRows& values, const PrefetchRows& next_keys,
             const PrefetchRows& next_values) {
    rows_ = {keys, values, next_keys, next_values};
    if (started_ && current_ >= 2) {
      current_ -= 2;
      return;
    }
    current_ = 0;
    start_rows();
    if (!started_) advance(bytes_ahead);
    started_ = true;
  }

  /// As many bytes are about to be read.
  void advance(std::int64_t bytes) {
    while (bytes > 0 && current_ < rows_.size()) {
      const PrefetchRows& rows = rows_[current_];
      if (key_ >= rows.columns.end) {
        ++current_;
        start_rows();
        continue;
      }
      const char* row = rows.rows[key_] + head_ * rows.head_step;
      // Into the second cache: so much ahead would push what is in use out of the first.
      for (int byte = 0; byte < rows.bytes; byte += cache_line) __builtin_prefetch(row + byte, 0, 2);
      bytes -= rows.bytes;
      if (++head_ == rows.heads) {
        head_ = 0;
        ++key_;
      }
    }
  }

 private:
  // Enough to keep a core's reads under way for the time that memory takes to answer, and little beside its cache.
  static constexpr std::int64_t bytes_ahead = 32 * 1024;
  static constexpr int cache_line = 64;

  void start_rows() {
    if (current_ < rows_.size()) key_ = rows_[current_].columns.begin;
    head_ = 0;
  }

  std::array<PrefetchRows, 4> rows_;
  bool started_ = false;
  std::size_t current_ = 0;  ///< of rows_
  int key_ = 0;
  int head_ = 0;
};

}  // namespace mate::cpu
