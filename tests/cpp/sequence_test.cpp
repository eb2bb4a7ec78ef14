// Where sequences lie, against a plain list of the cells of each sequence; and that lengths which lie point
// nowhere outside the tensors.
#include "attention/sequence.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <climits>
#include <cstdint>
#include <deque>
#include <ostream>
#include <string>
#include <vector>

#include "random.h"

namespace mate {
namespace {

using testing::Random;

enum class Storage { normal, ragged, paged };

struct Cell {
  std::int64_t slot = 0;
  std::int64_t row = 0;

  bool operator==(const Cell&) const = default;
  friend std::ostream& operator<<(std::ostream& out, const Cell& cell) {
    return out << "(" << cell.slot << ", " << cell.row << ")";
  }
};

/// What is expected of one sequence.
struct ExpectedSequence {
  int query_capacity = 0;
  std::vector<int> query_rows;  // those that are used
  std::vector<Cell> keys;       // appended ones included
  std::vector<int> new_rows;    // rows of the new keys, the last of `keys`
  int key_capacity = 0;
  int total = 0;
  int rotary_base = 0;
};

/// A random batch: the layouts, the memory of their integers, and what they mean.
class Batch {
 public:
  std::vector<ExpectedSequence> sequences;
  QueryLayout queries;
  KeyLayout keys;
  Mask mask;

  Batch(Storage storage, int page_size, std::uint64_t seed) : random_(seed) {
    sequences.resize(random_.integer(1, 4));
    draw_queries();
    draw_keys(storage, page_size);
    if (random_.chance(0.5)) {
      mask.cp_world = static_cast<int>(random_.integer(2, 3));
      mask.cp_rank = static_cast<int>(random_.integer(0, mask.cp_world - 1));
      std::vector<int> totals;
      for (ExpectedSequence& s : sequences) totals.push_back(s.total = static_cast<int>(random_.integer(0, 40)));
      keys.cp_total = hold(totals);
    } else {
      for (ExpectedSequence& s : sequences) s.total = static_cast<int>(s.keys.size());
    }
  }

  /// Replaces every given integer vector, of lengths, offsets or indices, by garbage.
  void lie() {
    for (IntVector* vector : {&queries.cu_seqlens, &queries.seqused, &keys.cu_seqlens, &keys.seqused, &keys.leftpad,
                              &keys.batch_index, &keys.cu_seqlens_new, &keys.cp_total, &keys.rotary_seqlens}) {
      if (!vector->given() || random_.chance(0.3)) continue;
      std::vector<int> garbage;
      for (std::size_t i = 0; i <= sequences.size(); ++i) {
        garbage.push_back(random_.one_of<int>({INT_MIN, -7, -1, 0, 1, 2, 3, 5, 9, 20, 1000, INT_MAX}));
      }
      *vector = hold(garbage);
    }
  }

 private:
  /// The values in memory of their own that ends with the last of them, some with a stride.
  IntVector hold(const std::vector<int>& values) {
    const std::size_t stride = random_.one_of<std::size_t>({1, 1, 3});
    std::vector<int>& memory = integers_.emplace_back((values.size() - 1) * stride + 1, -1000);
    for (std::size_t i = 0; i < values.size(); ++i) memory[i * stride] = values[i];
    return {memory.data(), static_cast<long long>(stride)};
  }

  /// Offsets of segments of these lengths, with rows before the first of them. Sets `rows` of the whole
  /// tensor.
  std::vector<int> offsets_of(const std::vector<int>& lengths, int& rows) {
    std::vector<int> offsets{static_cast<int>(random_.integer(0, 2))};
    for (const int length : lengths) offsets.push_back(offsets.back() + length);
    rows = offsets.back() + static_cast<int>(random_.integer(0, 2));
    return offsets;
  }

  std::vector<int> draw_lengths(int most) {
    std::vector<int> lengths;
    for (std::size_t b = 0; b < sequences.size(); ++b) {
      lengths.push_back(static_cast<int>(random_.integer(0, most)));
    }
    return lengths;
  }

  void draw_queries() {
    std::vector<int> starts(sequences.size(), 0);
    std::vector<int> lengths;
    if (random_.chance(0.5)) {
      lengths = draw_lengths(5);
      starts = offsets_of(lengths, queries.rows);
      queries.cu_seqlens = hold(starts);
    } else {
      queries.rows = static_cast<int>(random_.integer(0, 5));
      lengths.assign(sequences.size(), queries.rows);
    }
    for (std::size_t b = 0; b < sequences.size(); ++b) sequences[b].query_capacity = lengths[b];
    if (random_.chance(0.5)) {
      for (int& length : lengths) length = static_cast<int>(random_.integer(0, length));
      queries.seqused = hold(lengths);
    }
    for (std::size_t b = 0; b < sequences.size(); ++b) {
      for (int i = 0; i < lengths[b]; ++i) sequences[b].query_rows.push_back(starts[b] + i);
    }
  }

  void draw_keys(Storage storage, int page_size) {
    const int batch = static_cast<int>(sequences.size());
    // Rows of the cache, or of the page table, of which the sequences use some in any order.
    std::vector<int> cache_rows;
    const int rows = batch + (random_.chance(0.5) ? static_cast<int>(random_.integer(0, 3)) : 0);
    for (int row = 0; row < rows; ++row) cache_rows.push_back(row);
    if (storage != Storage::ragged && (rows > batch || random_.chance(0.3))) {
      random_.shuffle(cache_rows);
      keys.batch_index = hold({cache_rows.begin(), cache_rows.begin() + batch});
    }

    std::vector<std::vector<Cell>> cells(batch);  // the capacity of each sequence, position by position
    if (storage == Storage::normal) {
      keys.rows = static_cast<int>(random_.integer(0, 9));
      keys.slots = rows;
      for (int b = 0; b < batch; ++b) {
        for (int t = 0; t < keys.rows; ++t) cells[b].push_back({cache_rows[b], t});
      }
    } else if (storage == Storage::ragged) {
      keys.slots = 1;
      const std::vector<int> lengths = draw_lengths(9);
      const std::vector<int> offsets = offsets_of(lengths, keys.rows);
      keys.cu_seqlens = hold(offsets);
      for (int b = 0; b < batch; ++b) {
        for (int t = 0; t < lengths[b]; ++t) cells[b].push_back({0, offsets[b] + t});
      }
    } else {
      keys.rows = page_size;
      keys.page_rows = rows;
      const int max_pages = static_cast<int>(random_.integer(0, 4));
      keys.table_capacity = table_capacity_of(max_pages, page_size);
      keys.page_table_stride = max_pages + random_.integer(0, 2);
      std::vector<int>& table = integers_.emplace_back(rows * keys.page_table_stride + 1, -1000);
      keys.slots = static_cast<int>(random_.integer(1, 20));
      for (int row = 0; row < rows; ++row) {
        for (int page = 0; page < max_pages; ++page) {
          table[row * keys.page_table_stride + page] = static_cast<int>(random_.integer(0, keys.slots - 1));
        }
      }
      keys.page_table = table.data();
      for (int b = 0; b < batch; ++b) {
        for (int t = 0; t < keys.table_capacity; ++t) {
          cells[b].push_back({table[cache_rows[b] * keys.page_table_stride + t / page_size], t % page_size});
        }
      }
    }

    std::vector<int> used(batch), leftpad(batch, 0);
    for (int b = 0; b < batch; ++b) used[b] = static_cast<int>(cells[b].size());
    keys.appends = storage != Storage::ragged && random_.chance(0.5);
    if (keys.appends || random_.chance(0.5)) {
      for (int& count : used) count = static_cast<int>(random_.integer(0, count));
      keys.seqused = hold(used);
    }
    if (storage != Storage::ragged && random_.chance(0.5)) {
      for (int b = 0; b < batch; ++b) leftpad[b] = static_cast<int>(random_.integer(0, used[b]));
      keys.leftpad = hold(leftpad);
    }
    for (int b = 0; b < batch; ++b) {
      sequences[b].key_capacity = static_cast<int>(cells[b].size());
      sequences[b].rotary_base = keys.appends ? used[b] : 0;
    }
    std::vector<int> added(batch, 0);
    if (keys.appends) draw_new_keys(used, added);
    for (int b = 0; b < batch; ++b) {
      sequences[b].keys.assign(cells[b].begin() + leftpad[b], cells[b].begin() + used[b] + added[b]);
    }
  }

  void draw_new_keys(const std::vector<int>& used, std::vector<int>& added) {
    const int batch = static_cast<int>(sequences.size());
    std::vector<int> starts(batch, 0);
    int room = INT_MAX;
    for (int b = 0; b < batch; ++b) room = std::min(room, sequences[b].key_capacity - used[b]);
    if (random_.chance(0.5)) {
      for (int b = 0; b < batch; ++b) {
        added[b] = static_cast<int>(random_.integer(0, std::min(4, sequences[b].key_capacity - used[b])));
      }
      starts = offsets_of(added, keys.new_rows);
      keys.cu_seqlens_new = hold(starts);
    } else {
      keys.new_rows = static_cast<int>(random_.integer(0, std::min(4, room)));
      added.assign(batch, keys.new_rows);
    }
    for (int b = 0; b < batch; ++b) {
      for (int t = 0; t < added[b]; ++t) sequences[b].new_rows.push_back(starts[b] + t);
    }
    if (random_.chance(0.3)) {
      std::vector<int> positions = draw_lengths(100);
      keys.rotary_seqlens = hold(positions);
      for (int b = 0; b < batch; ++b) sequences[b].rotary_base = positions[b];
    }
  }

  Random random_;
  std::deque<std::vector<int>> integers_;
};

struct StorageParameter {
  Storage storage;
  int page_size = 0;

  friend std::ostream& operator<<(std::ostream& out, const StorageParameter& p) {
    return out << (p.storage == Storage::normal   ? "normal"
                   : p.storage == Storage::ragged ? "ragged"
                                                  : "paged by " + std::to_string(p.page_size));
  }
};

class SequencesOf : public ::testing::TestWithParam<StorageParameter> {
 protected:
  static constexpr int batches = 3000;
};

TEST_P(SequencesOf, LieWhereTheirLengthsSay) {
  for (std::uint64_t seed = 0; seed < batches && !HasFailure(); ++seed) {
    SCOPED_TRACE(seed);
    const Batch batch(GetParam().storage, GetParam().page_size, seed);
    for (int b = 0; b < static_cast<int>(batch.sequences.size()); ++b) {
      SCOPED_TRACE(b);
      const ExpectedSequence& expected = batch.sequences[b];
      const Sequence s = locate_sequence(batch.queries, batch.keys, batch.mask, b);
      EXPECT_EQ(s.query_capacity, expected.query_capacity);
      ASSERT_EQ(s.lengths.sq, static_cast<int>(expected.query_rows.size()));
      for (int i = 0; i < s.lengths.sq; ++i) EXPECT_EQ(s.first_q + i, expected.query_rows[i]);

      EXPECT_EQ(key_capacity(batch.keys, b), expected.key_capacity);
      ASSERT_EQ(s.lengths.sk, static_cast<int>(expected.keys.size()));
      EXPECT_EQ(s.lengths.total, expected.total);
      for (int j = 0; j < s.lengths.sk; ++j) {
        const Location at = locate_key(batch.keys, s, j);
        EXPECT_EQ((Cell{at.slot, at.row}), expected.keys[j]) << "key " << j;
      }

      ASSERT_EQ(s.new_keys, static_cast<int>(expected.new_rows.size()));
      for (int t = 0; t < s.new_keys; ++t) {
        EXPECT_EQ(s.first_new + t, expected.new_rows[t]);
        const Location at = locate_position(batch.keys, s, s.append_at + t);
        EXPECT_EQ((Cell{at.slot, at.row}), expected.keys[s.lengths.sk - s.new_keys + t]) << "new key " << t;
      }
      EXPECT_EQ(s.rotary_base, expected.rotary_base);
    }
  }
}

TEST_P(SequencesOf, StayInsideWhateverTheLengthsHold) {
  for (std::uint64_t seed = 0; seed < batches && !HasFailure(); ++seed) {
    SCOPED_TRACE(seed);
    Batch batch(GetParam().storage, GetParam().page_size, seed);
    batch.lie();
    const KeyLayout& keys = batch.keys;
    for (int b = 0; b < static_cast<int>(batch.sequences.size()); ++b) {
      SCOPED_TRACE(b);
      const Sequence s = locate_sequence(batch.queries, keys, batch.mask, b);
      EXPECT_GE(s.lengths.sq, 0);
      EXPECT_GE(s.first_q, 0);
      EXPECT_LE(s.first_q + s.lengths.sq, batch.queries.rows);

      EXPECT_GE(s.lengths.sk, 0);
      EXPECT_GE(s.lengths.total, 0);
      EXPECT_GE(s.first_k, 0);
      EXPECT_GE(s.new_keys, 0);
      EXPECT_LE(s.new_keys, s.lengths.sk);
      EXPECT_GE(s.first_new, 0);
      EXPECT_LE(s.first_new + s.new_keys, keys.new_rows);
      EXPECT_GE(s.append_at, 0);
      EXPECT_LE(s.lengths.sk, key_capacity(keys, b));
      if (s.lengths.sk > 0) {
        EXPECT_GE(s.cache_row, 0);
        EXPECT_LT(s.cache_row, keys.paged() ? keys.page_rows : keys.slots);
      }
      // A page table is read below; without pages a key's cell follows from what is checked here.
      if (HasFailure()) return;
      for (int j = 0; j < s.lengths.sk; ++j) {
        const Location at = locate_key(keys, s, j);
        EXPECT_TRUE(at.slot >= 0 && at.slot < keys.slots && at.row >= 0 && at.row < keys.rows) << "key " << j;
      }
      for (int t = 0; t < s.new_keys; ++t) {
        const Location at = locate_position(keys, s, s.append_at + t);
        EXPECT_TRUE(at.slot >= 0 && at.slot < keys.slots && at.row >= 0 && at.row < keys.rows) << "new key " << t;
      }
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Storages, SequencesOf,
                         ::testing::Values(StorageParameter{Storage::normal}, StorageParameter{Storage::ragged},
                                           StorageParameter{Storage::paged, 1}, StorageParameter{Storage::paged, 2},
                                           StorageParameter{Storage::paged, 3}, StorageParameter{Storage::paged, 5}));

// Evaluated by the compiler, which refuses whatever overflows or reads outside.
constexpr int lowest_and_highest[] = {INT_MIN, INT_MAX};
constexpr int highest_and_lowest[] = {INT_MAX, INT_MIN};
constexpr Sequence sequence_of(const int* offsets, const int* lengths) {
  QueryLayout queries;
  queries.rows = INT_MAX;
  queries.cu_seqlens = {offsets};
  KeyLayout keys;
  keys.rows = INT_MAX;
  keys.slots = 1;
  keys.seqused = {lengths};
  keys.leftpad = {lengths};
  keys.appends = true;
  keys.new_rows = INT_MAX;
  keys.cu_seqlens_new = {offsets};
  return locate_sequence(queries, keys, {}, 0);
}
static_assert(sequence_of(lowest_and_highest, lowest_and_highest).lengths.sq == INT_MAX);
static_assert(sequence_of(lowest_and_highest, lowest_and_highest).lengths.sk == INT_MAX);
static_assert(sequence_of(highest_and_lowest, lowest_and_highest).lengths.sq == 0);
static_assert(sequence_of(highest_and_lowest, highest_and_lowest).lengths.sk == 0);

TEST(SequenceTest, PositionsOfALongPagedCacheAreCountedIn64Bits) {
  const std::vector<int> table(5, 0);
  KeyLayout keys;
  keys.rows = 1 << 30;
  keys.slots = 1;
  keys.page_table = table.data();
  keys.page_table_stride = 5;
  keys.page_rows = 1;
  keys.table_capacity = table_capacity_of(5, keys.rows);
  EXPECT_EQ(keys.table_capacity, INT_MAX);
  const int leftpad = INT_MAX - 1;
  keys.leftpad = {&leftpad};
  QueryLayout queries;
  queries.rows = 1;
  const Sequence s = locate_sequence(queries, keys, {}, 0);
  EXPECT_EQ(s.lengths.sk, 1);
  EXPECT_EQ(locate_key(keys, s, 0).row, (1 << 30) - 2);
}

}  // namespace
}  // namespace mate
