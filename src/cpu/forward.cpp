#include <algorithm>
#include <array>
#include <atomic>
#include <cmath>
#include <limits>
#include <memory>
#include <mutex>
#include <new>
#include <numbers>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "backend.h"
#include "kernels.h"
#include "merge.h"
#include "parallel.h"
#include "prefetch.h"
#include "rotate.h"

namespace mate::cpu {
namespace {

/// A tile of query rows of one sequence, the same for all head units.
struct Tile {
  int b;
  int index;
  BlockRange blocks;
  int splits;
  int units_of_task;              ///< head units that are worked on together
  std::int64_t first_split_tile;  ///< its SplitTile of the first units, where it has more than one split
};

/// One piece of work: a split of a tile, for some head units.
struct Task {
  int tile;
  int first_unit;
  int split;
};

/// The work of a call.
struct Schedule {
  std::vector<Tile> tiles;
  std::vector<Task> tasks;
  std::int64_t split_tiles = 0;
  int workers = 1;
};

/// Floats of queries, sums and scores that a thread holds at most, however many head units it takes together: they had
/// better stay in its cache.
constexpr std::int64_t floats_of_task = 64 * 1024;

Schedule make_schedule(const Problem& problem, const Plan& plan) {
  Schedule schedule;
  const Tiling& tiling = plan.tiling;
  const int units = plan.head_units(problem);
  if (units == 0) return schedule;
  const int head_dims = problem.head_dim + problem.head_dim_v;
  double multiplications = 0;
  std::int64_t streamed_pieces = 0;
  for (int b = 0; b < problem.batch; ++b) {
    const Lengths lengths = problem.sequence(b).lengths;
    for (int tile = 0; tile < tiles_of(tiling, lengths.sq); ++tile) {
      const BlockRange blocks = blocks_of_tile(tiling, problem.mask, lengths, tile);
      const int rows = rows_of_tile(tiling, lengths.sq, tile).count();
      // A split without a block would add nothing.
      const int splits = std::clamp(blocks.size(), 1, plan.splits[b]);
      const bool streams = plan.streams(lengths);
      const std::int64_t floats_of_unit = std::int64_t{rows} * head_dims + block_keys * width_multiple;
      const int most_units = clamp(floats_of_task / floats_of_unit, 1, units);
      schedule.tiles.push_back({b, tile, blocks, splits, streams ? most_units : 1, 0});
      if (streams) streamed_pieces += splits;
      multiplications += double{block_keys} * blocks.size() * rows * units * head_dims;
    }
  }
  schedule.workers = workers_for(multiplications, plan.workers);
  if (streamed_pieces > 0 && schedule.workers > 1) {
    // With too few pieces for all workers, the head units are shared out too.
    const std::int64_t groups = divide_up(std::int64_t{schedule.workers} * pieces_per_worker, streamed_pieces);
    for (Tile& tile : schedule.tiles) tile.units_of_task = clamp(divide_up(units, groups), 1, tile.units_of_task);
  }
  // The longest first: whatever is taken last is short, so that all workers end together.
  std::stable_sort(schedule.tiles.begin(), schedule.tiles.end(), [](const Tile& a, const Tile& b) {
    return std::int64_t{a.blocks.size()} * b.splits > std::int64_t{b.blocks.size()} * a.splits;
  });
  for (int index = 0; index < static_cast<int>(schedule.tiles.size()); ++index) {
    Tile& tile = schedule.tiles[index];
    tile.first_split_tile = schedule.split_tiles;
    if (tile.splits > 1) schedule.split_tiles += divide_up(units, tile.units_of_task);
    for (int unit = 0; unit < units; unit += tile.units_of_task) {
      for (int split = 0; split < tile.splits; ++split) schedule.tasks.push_back({index, unit, split});
    }
  }
  return schedule;
}

int round_up(int value, int multiple) { return static_cast<int>(divide_up(value, multiple)) * multiple; }

/// Memory that starts at a cache line, where vectors had better start too. Its floats are 0 when they are new.
class Floats {
 public:
  float* data() const { return data_.get(); }

  void reserve(std::size_t size) {
    if (size <= size_) return;
    data_.reset(new (std::align_val_t{cache_line}) float[size]());
    size_ = size;
  }

 private:
  static constexpr std::size_t cache_line = 64;
  struct Delete {
    void operator()(float* data) const { ::operator delete[](data, std::align_val_t{cache_line}); }
  };
  std::unique_ptr<float[], Delete> data_;
  std::size_t size_ = 0;
};

/// What the rows of a task have summed up over the keys of one split.
struct Partial {
  Floats sums;  ///< (head units, rows, width)
  Floats max;   ///< (head units, places)
  Floats sum;   ///< (head units, places)

  void start(std::size_t rows, std::size_t width, std::size_t places) {
    sums.reserve(rows * width);
    max.reserve(places);
    sum.reserve(places);
    std::fill_n(sums.data(), rows * width, 0.0F);
    std::fill_n(max.data(), places, -std::numeric_limits<float>::infinity());
    std::fill_n(sum.data(), places, 0.0F);
  }
};

/// The splits of one tile and its head units of a task: whichever worker finishes the last of them merges all, always
/// in their order.
struct SplitTile {
  std::once_flag allocated;
  std::unique_ptr<Partial[]> partials;
  std::atomic<int> finished = 0;
};

/// Query rows that are worked on together.
struct Strip {
  int first;  ///< row of the tile
  int rows;
  KeyRange some;   ///< keys that some row sees
  KeyRange every;  ///< keys that every row sees
};

/// Where the rows of a block of keys lie, for the first key head of a task. Those outside the columns that the tile
/// sees, up to the next multiples of key_step, are rows that it does see: they may be read, and their scores are
/// masked.
struct LocatedBlock {
  KeyRange columns;
  std::array<const char*, block_keys> keys;
  std::array<const char*, block_keys> values;
};

/// A thread's own memory. Its size is bounded by floats_of_task or, where one head unit needs more, by head sizes.
struct Workspace {
  Floats rows;                     ///< (strip_rows, d or dv): queries before they are packed
  Floats queries;                  ///< streamed: (head units, rows, depth); packed: for each strip (depth, strip_rows)
  Floats keys;                     ///< packed: (block_keys, depth)
  Floats values;                   ///< packed: (block_keys, width)
  Floats block_sums;               ///< streamed: (head units, rows, width)
  Floats scores;                   ///< (head units, block_keys, strip_rows)
  Floats row;                      ///< one row: a query that is rotated, or the merged sums
  Floats scratch;                  ///< the angles of a rotation, then the rotated query in its own type
  Floats rescale;                  ///< (head units, strip_rows)
  std::vector<int> visible_begin;  ///< for each row of the tile
  std::vector<int> visible_count;
  std::vector<Strip> strips;
  LocatedBlock blocks[2];
  Partial partial;
};

thread_local Workspace thread_workspace;

/// The attention of one tile of query rows of some head units over some key blocks.
///
/// Few rows read their keys where they lie (streamed): the work is to read each key once, and all head units of a block
/// come together, since they are neighbours in memory. Many rows pack a block of keys, once for all of them, into what
/// the products are fastest with.
class TileAttention {
 public:
  TileAttention(const Problem& problem, const Plan& plan, const Tile& tile, int first_unit)
      : problem_(problem),
        kernels_(kernels()),
        workspace_(thread_workspace),
        pack_(plan.tiling.pack),
        b_(tile.b),
        first_unit_(first_unit),
        units_(std::min(tile.units_of_task, plan.head_units(problem) - first_unit)),
        sequence_(problem.sequence(tile.b)),
        streams_(plan.streams(sequence_.lengths)),
        packed_(has_bfloat16_products() ? kernels_.bfloat16 : kernels_.float32),
        rows_(rows_of_tile(plan.tiling, sequence_.lengths.sq, tile.index)),
        places_(round_up(rows_.count(), width_multiple)),
        keys_(keys_of_tile(plan.tiling, problem.mask, sequence_.lengths, tile.index)),
        width_(round_up(problem.head_dim_v, width_multiple)) {
    const int step = streams_ ? width_multiple : packed_.numbers_per_lane;
    const auto length_of = [&](int head_dim) { return round_up(head_dim, step) / (streams_ ? 1 : step); };
    qv_at_ = length_of(problem.head_dim);
    depth_ = qv_at_ + (problem.qv.given() ? length_of(problem.head_dim_v) : 0);
  }

  /// Sums up over `blocks`.
  void run(BlockRange blocks, Partial& partial) {
    partial.start(std::size_t(units_) * rows_.count(), width_, std::size_t(units_) * places_);
    if (blocks.size() == 0) return;
    reserve();
    find_visible();
    load_queries();
    LocatedBlock* block = &workspace_.blocks[0];
    LocatedBlock* next = &workspace_.blocks[1];
    locate(blocks.begin, *block);
    Prefetcher prefetcher;
    for (int n = blocks.begin; n < blocks.end; ++n) {
      next->columns = {};
      if (n + 1 < blocks.end) locate(n + 1, *next);
      if (streams_) {
        prefetcher.enter(keys_to_fetch(*block), values_to_fetch(*block), keys_to_fetch(*next), values_to_fetch(*next));
        stream(n * block_keys, *block, prefetcher, partial);
      } else {
        multiply_packed(n * block_keys, *block, partial);
      }
      std::swap(block, next);
    }
  }

  /// Writes out and lse from all parts.
  void finish(std::span<const Partial> partials) {
    std::vector<PartialRow> parts(partials.size());
    workspace_.row.reserve(max_head_dim);
    float* merged = workspace_.row.data();
    const int slot = problem_.query_slot(b_);
    for (int unit = 0; unit < units_; ++unit) {
      const float descale = problem_.v_descale.at(b_, key_head(unit));
      for (int row = 0; row < rows_.count(); ++row) {
        for (std::size_t i = 0; i < partials.size(); ++i) {
          const RunningSoftmax softmax = softmax_of(partials[i], unit, row);
          parts[i] = {sums_of(partials[i], unit, row), *softmax.max, *softmax.sum};
        }
        const int head = query_head(unit, row);
        const float lse = merge_row(parts, sink_of(head), problem_.head_dim_v, merged);
        if (descale != 1) {
          for (int i = 0; i < problem_.head_dim_v; ++i) merged[i] *= descale;
        }
        const std::int64_t out_row = std::int64_t{sequence_.first_q} + query_row(row);
        kernels_.narrow(merged, problem_.out.type, problem_.out.at(slot, out_row, head), problem_.head_dim_v);
        if (problem_.lse.data != nullptr) problem_.lse.at(slot, head, out_row) = lse;
      }
    }
  }

 private:
  /// The factor that takes natural scores to the base-2 domain, as far as float32 reaches.
  static float to_base_2(float scale) {
    constexpr float largest = std::numeric_limits<float>::max();
    return std::clamp(scale * std::numbers::log2e_v<float>, -largest, largest);
  }

  int query_row(int row) const { return static_cast<int>((rows_.first + row) / pack_); }
  int query_head(int unit, int row) const {
    return (first_unit_ + unit) * pack_ + static_cast<int>((rows_.first + row) % pack_);
  }
  int key_head(int unit) const { return (first_unit_ + unit) * pack_ / problem_.group(); }

  static KeyRange columns_of(KeyRange keys, int first_key) {
    return {std::clamp(keys.begin - first_key, 0, block_keys), std::clamp(keys.end - first_key, 0, block_keys)};
  }

  static KeyRange rounded_out(KeyRange columns) {
    if (columns.empty()) return {};
    return {columns.begin / key_step * key_step, round_up(columns.end, key_step)};
  }

  /// Whether all operands are bfloat16, and the processor multiplies those.
  bool has_bfloat16_products() const {
    const auto matches = [](const Rows& rows) { return !rows.given() || rows.type == ElementType::bfloat16; };
    const bool scaled = problem_.q_descale.data != nullptr || problem_.k_descale.data != nullptr;
    return kernels_.bfloat16.numbers_per_lane != 0 && !scaled && matches(problem_.q) && matches(problem_.qv) &&
           matches(problem_.k) && matches(problem_.v);
  }

  void reserve() {
    const int strips = static_cast<int>(divide_up(rows_.count(), strip_rows));
    workspace_.rows.reserve(std::size_t{strip_rows} * std::max(problem_.head_dim, problem_.head_dim_v));
    workspace_.queries.reserve(std::size_t(depth_) * (streams_ ? units_ * rows_.count() : strips * strip_rows));
    if (streams_) {
      workspace_.block_sums.reserve(std::size_t(units_) * rows_.count() * width_);
    } else {
      workspace_.keys.reserve(std::size_t(block_keys) * depth_);
      workspace_.values.reserve(std::size_t(block_keys) * width_);
    }
    workspace_.scores.reserve(std::size_t(units_) * block_keys * strip_rows);
    workspace_.row.reserve(max_head_dim);
    workspace_.scratch.reserve(max_head_dim);
    workspace_.rescale.reserve(std::size_t(units_) * strip_rows);
  }

  void find_visible() {
    std::vector<int>& begin = workspace_.visible_begin;
    std::vector<int>& count = workspace_.visible_count;
    begin.assign(places_, 0);
    count.assign(places_, 0);
    for (int row = 0; row < rows_.count(); ++row) {
      const KeyRange keys = visible_keys(problem_.mask, sequence_.lengths, query_row(row));
      begin[row] = keys.begin;
      count[row] = keys.size();
    }
    workspace_.strips.clear();
    for (int first = 0; first < rows_.count(); first += strip_rows) {
      const int rows = std::min(strip_rows, rows_.count() - first);
      const int first_row = query_row(first);
      const int last_row = query_row(first + rows - 1);
      workspace_.strips.push_back({first, rows, keys_of_some_row(problem_.mask, sequence_.lengths, first_row, last_row),
                                   keys_of_every_row(problem_.mask, sequence_.lengths, first_row, last_row)});
    }
  }

  /// Scores are multiplied by numbers of at least 0 only: a negative scale turns the queries' signs instead.
  float sign() const { return problem_.softmax_scale < 0 ? -1.0F : 1.0F; }

  void load_queries() {
    for (int unit = 0; unit < units_; ++unit) {
      const float factor = sign() * problem_.q_descale.at(b_, key_head(unit));
      load_queries(problem_.q, problem_.head_dim, factor * problem_.k_descale.at(b_, key_head(unit)), unit, 0);
      if (problem_.qv.given()) {
        load_queries(problem_.qv, problem_.head_dim_v, factor * problem_.v_descale.at(b_, key_head(unit)), unit,
                     qv_at_);
      }
    }
  }

  /// Loads the rows of q or qv, from `at` on in what is summed over.
  void load_queries(const Rows& source, int head_dim, float factor, int unit, int at) {
    if (streams_) {
      const int padded = round_up(head_dim, width_multiple);
      for (int row = 0; row < rows_.count(); ++row) {
        float* target = streamed_queries(unit) + row * depth_ + at;
        load_query(source, head_dim, factor, unit, row, target);
        std::fill(target + head_dim, target + padded, 0.0F);
      }
      return;
    }
    float* rows = workspace_.rows.data();
    for (const Strip& strip : workspace_.strips) {
      for (int row = 0; row < strip.rows; ++row) {
        load_query(source, head_dim, factor, unit, strip.first + row, rows + row * head_dim);
      }
      packed_.pack_queries(rows, head_dim, strip.rows, head_dim, packed_queries(strip) + at * strip_rows);
    }
  }

  void load_query(const Rows& source, int head_dim, float factor, int unit, int row, float* target) {
    const void* query =
        source.at(problem_.query_slot(b_), std::int64_t{sequence_.first_q} + query_row(row), query_head(unit, row));
    const bool rotates = problem_.rotary.given() && &source == &problem_.q;
    if (rotates) query = rotated_query(query, query_row(row));
    kernels_.widen(source.type, query, factor, target, head_dim);
  }

  float* streamed_queries(int unit) const {
    return workspace_.queries.data() + std::int64_t{unit} * rows_.count() * depth_;
  }
  float* packed_queries(const Strip& strip) const {
    return workspace_.queries.data() + std::int64_t{strip.first} * depth_;
  }

  /// The rotated query, rounded to its own type.
  const void* rotated_query(const void* source, int query_row) {
    float* row = workspace_.row.data();
    float* scratch = workspace_.scratch.data();
    kernels_.widen(problem_.q.type, source, 1, row, problem_.head_dim);
    const std::int64_t step = problem_.rotary.queries_advance ? query_row : 0;
    rotate(problem_.rotary, sequence_.rotary_base + step, kernels_, row, scratch);
    kernels_.narrow(row, problem_.q.type, scratch, problem_.head_dim);
    return scratch;
  }

  void locate(int n, LocatedBlock& block) const {
    const int first_key = n * block_keys;
    // Keys of the block that no row of the tile sees are not read.
    block.columns = columns_of(keys_, first_key);
    if (block.columns.empty()) return;
    const std::int64_t key_step_bytes = problem_.k.row_stride * bytes_of(problem_.k.type);
    const std::int64_t value_step_bytes = problem_.v.row_stride * bytes_of(problem_.v.type);
    const int position = sequence_.first_k + first_key + block.columns.begin;
    Location location = locate_position(problem_.keys, sequence_, position);
    std::int64_t page = problem_.keys.paged() ? position / problem_.keys.rows : 0;
    for (int column = block.columns.begin; column < block.columns.end;) {
      const char* key = static_cast<const char*>(problem_.k.at(location.slot, location.row, key_head(0)));
      const char* value = static_cast<const char*>(problem_.v.at(location.slot, location.row, key_head(0)));
      // Rows of one page, or of a cache without pages, lie at one distance from each other.
      const std::int64_t rest = block.columns.end - column;
      const int run = static_cast<int>(std::min<std::int64_t>(rest, problem_.keys.rows - location.row));
      for (const int end = column + run; column < end; ++column) {
        block.keys[column] = key;
        block.values[column] = value;
        // The address is translated by the time the row is fetched.
        __builtin_prefetch(key);
        __builtin_prefetch(value);
        key += key_step_bytes;
        value += value_step_bytes;
      }
      if (column < block.columns.end) location = {page_of(problem_.keys, sequence_, ++page), 0};
    }
    const KeyRange rounded = rounded_out(block.columns);
    const auto copy_row = [&](int from, int begin, int end) {
      for (auto* rows : {&block.keys, &block.values})
        std::fill(rows->begin() + begin, rows->begin() + end, (*rows)[from]);
    };
    copy_row(block.columns.begin, rounded.begin, block.columns.begin);
    copy_row(block.columns.end - 1, block.columns.end, rounded.end);
  }

  PrefetchRows keys_to_fetch(const LocatedBlock& block) const {
    return rows_to_fetch(problem_.k, problem_.head_dim, block.keys, block.columns);
  }
  PrefetchRows values_to_fetch(const LocatedBlock& block) const {
    return rows_to_fetch(problem_.v, problem_.head_dim_v, block.values, block.columns);
  }
  PrefetchRows rows_to_fetch(const Rows& rows, int head_dim, const std::array<const char*, block_keys>& located,
                             KeyRange columns) const {
    const int bytes = bytes_of(rows.type);
    return {located.data(), columns, key_head(units_ - 1) - key_head(0) + 1, rows.head_stride * bytes,
            head_dim * bytes};
  }

  BlockRows keys_of(const LocatedBlock& block, int unit) const {
    const int bytes = bytes_of(problem_.k.type);
    return {block.keys.data(), (key_head(unit) - key_head(0)) * problem_.k.head_stride * bytes};
  }
  BlockRows values_of(const LocatedBlock& block, int unit) const {
    const int bytes = bytes_of(problem_.v.type);
    return {block.values.data(), (key_head(unit) - key_head(0)) * problem_.v.head_stride * bytes};
  }

  /// One block, whose rows are read where they lie. All head units take a few keys before any takes the next ones:
  /// heads are neighbours in memory, and a processor reads fastest in the order of addresses.
  void stream(int first_key, const LocatedBlock& block, Prefetcher& prefetcher, Partial& partial) {
    const Strip& strip = workspace_.strips.front();
    const KeyRange columns = rounded_out(block.columns);
    const int key_bytes = problem_.head_dim * bytes_of(problem_.k.type);
    const int value_bytes = problem_.head_dim_v * bytes_of(problem_.v.type);
    const auto dot = [&](int unit, const Rows& source, BlockRows rows, int head_dim, int at, KeyRange keys) {
      kernels_.dot_scores(source.type, rows, streamed_queries(unit) + at, depth_, keys, strip.rows, head_dim, at > 0,
                          scores_of(unit));
    };
    for_few_keys(columns, key_bytes, [&](KeyRange keys) {
      for (int unit = 0; unit < units_; ++unit) {
        prefetcher.advance(std::int64_t{keys.size()} * key_bytes);
        dot(unit, problem_.k, keys_of(block, unit), problem_.head_dim, 0, keys);
      }
    });
    for (int unit = 0; unit < units_; ++unit) {
      if (problem_.qv.given()) {
        dot(unit, problem_.v, values_of(block, unit), problem_.head_dim_v, qv_at_, columns);
      }
      update_softmax(kernels_.float32, strip, first_key, columns, scores_of(unit), softmax_of(partial, unit),
                     rescale_of(unit));
    }
    for_few_keys(columns, value_bytes, [&](KeyRange keys) {
      for (int unit = 0; unit < units_; ++unit) {
        prefetcher.advance(std::int64_t{keys.size()} * value_bytes);
        kernels_.sum_values(problem_.v.type, scores_of(unit), values_of(block, unit), keys, keys.begin > columns.begin,
                            block_sums_of(unit), width_, strip.rows, problem_.head_dim_v);
      }
    });
    // The sums of a block are added up by themselves, for the precision of long contexts.
    for (int unit = 0; unit < units_; ++unit) {
      kernels_.add_block(block_sums_of(unit), rescale_of(unit), sums_of(partial, unit), strip.rows, width_);
    }
  }

  /// Calls run(keys) for parts of `columns` of a few keys, whose rows of all heads fit a core's first cache. How many
  /// shows in the rounding of sums, so it must not depend on how many head units make a task.
  template <typename Run>
  void for_few_keys(KeyRange columns, int row_bytes, const Run& run) const {
    constexpr int bytes = 16 * 1024;
    const int few = clamp(bytes / (problem_.heads_k * row_bytes) / dot_keys, 1, block_keys / dot_keys) * dot_keys;
    for (int key = columns.begin; key < columns.end; key += few) run(KeyRange{key, std::min(key + few, columns.end)});
  }

  float* block_sums_of(int unit) const {
    return workspace_.block_sums.data() + std::int64_t{unit} * rows_.count() * width_;
  }
  float* scores_of(int unit) const { return workspace_.scores.data() + std::int64_t{unit} * block_keys * strip_rows; }
  float* rescale_of(int unit) const { return workspace_.rescale.data() + std::int64_t{unit} * strip_rows; }
  float* sums_of(const Partial& partial, int unit, int row = 0) const {
    return partial.sums.data() + (std::int64_t{unit} * rows_.count() + row) * width_;
  }
  RunningSoftmax softmax_of(const Partial& partial, int unit, int row = 0) const {
    const std::int64_t place = std::int64_t{unit} * places_ + row;
    return {partial.max.data() + place, partial.sum.data() + place};
  }

  /// One block, packed for all strips of the tile.
  void multiply_packed(int first_key, const LocatedBlock& block, Partial& partial) {
    const KeyRange columns = rounded_out(block.columns);
    float* keys = workspace_.keys.data();
    float* values = workspace_.values.data();
    float* scores = workspace_.scores.data();
    packed_.pack_keys(problem_.k.type, keys_of(block, 0), columns, problem_.head_dim, keys, depth_);
    packed_.pack_values(problem_.v.type, values_of(block, 0), columns, problem_.head_dim_v, values, width_);
    if (problem_.qv.given()) {
      // Values lie behind the keys, as qv lies behind q: one product serves both.
      packed_.pack_keys(problem_.v.type, values_of(block, 0), columns, problem_.head_dim_v, keys + qv_at_, depth_);
    }
    for (const Strip& strip : workspace_.strips) {
      const KeyRange seen = rounded_out(columns_of(strip.some, first_key));
      if (seen.empty()) continue;
      packed_.multiply_scores(keys, packed_queries(strip), seen, strip.rows, depth_, scores);
      update_softmax(packed_, strip, first_key, seen, scores, softmax_of(partial, 0, strip.first), rescale_of(0));
      packed_.accumulate(scores, values, seen, rescale_of(0), sums_of(partial, 0, strip.first), strip.rows, width_);
    }
  }

  void update_softmax(const PackedKernels& packed, const Strip& strip, int first_key, KeyRange columns, float* scores,
                      RunningSoftmax softmax, float* rescale) {
    // The products are scaled when they are finished: scaled queries could overflow where scores do not.
    float scale = std::abs(problem_.softmax_scale);
    if (problem_.softcap > 0) {
      kernels_.cap_scores(scores, columns, scale, problem_.softcap, strip.rows);
      scale = 1;
    }
    VisibleKeys visible;
    if (strip.every.begin > first_key + columns.begin || strip.every.end < first_key + columns.end) {
      visible = {workspace_.visible_begin.data() + strip.first, workspace_.visible_count.data() + strip.first,
                 first_key};
    }
    packed.update_softmax(scores, columns, visible, to_base_2(scale), strip.rows, softmax, rescale);
  }

  std::optional<double> sink_of(int head) const {
    if (!problem_.sink.given()) return std::nullopt;
    float value;
    kernels_.widen(problem_.sink.type, problem_.sink.at(head), 1, &value, 1);
    return value;
  }

  const Problem& problem_;
  const Kernels& kernels_;
  Workspace& workspace_;
  int pack_;
  int b_;
  int first_unit_;
  int units_;
  Sequence sequence_;
  bool streams_;
  const PackedKernels& packed_;
  TileRows rows_;
  int places_;  ///< rows_ of one head unit, rounded up to whole vectors
  KeyRange keys_;
  int width_;  ///< of the rows of values and sums, padding included
  int qv_at_;  ///< where qv and the values start in what is summed over for the scores,
  int depth_;  ///< and where that ends
};

/// Rows of out that belong to no query: 0, and -inf in lse.
void clear_rows(const Problem& problem, std::int64_t slot, std::int64_t begin, std::int64_t end) {
  const std::size_t bytes = std::size_t(problem.head_dim_v) * bytes_of(problem.out.type);
  for (std::int64_t row = begin; row < end; ++row) {
    for (int head = 0; head < problem.heads_q; ++head) {
      std::fill_n(static_cast<char*>(problem.out.at(slot, row, head)), bytes, 0);
      if (problem.lse.data != nullptr) problem.lse.at(slot, head, row) = -std::numeric_limits<float>::infinity();
    }
  }
}

void clear_unused_rows(const Problem& problem) {
  std::int64_t end_of_last = 0;
  for (int b = 0; b < problem.batch; ++b) {
    const Sequence sequence = problem.sequence(b);
    const std::int64_t end = std::int64_t{sequence.first_q} + sequence.lengths.sq;
    if (problem.ragged_queries()) {
      clear_rows(problem, 0, end_of_last, sequence.first_q);
      end_of_last = end;
    } else {
      clear_rows(problem, b, end, problem.queries.rows);
    }
  }
  if (problem.ragged_queries()) clear_rows(problem, 0, end_of_last, problem.queries.rows);
}

}  // namespace

Machine machine(const Problem& problem) {
  // The queries and sums of a tile stay in a core's second cache, which holds a megabyte or more.
  constexpr int floats_of_tile = 128 * 1024;
  const int depth = problem.head_dim + (problem.qv.given() ? problem.head_dim_v : 0);
  const int strips = std::clamp(floats_of_tile / (strip_rows * (depth + problem.head_dim_v)), 1, 8);
  return {strip_rows, strips * strip_rows, block_keys, streamed_rows, available_threads()};
}

void forward(const Problem& problem, const Plan& plan) {
  const Schedule schedule = make_schedule(problem, plan);
  std::vector<SplitTile> split_tiles(schedule.split_tiles);
  clear_unused_rows(problem);
  parallel_for(static_cast<std::int64_t>(schedule.tasks.size()), schedule.workers, [&](std::int64_t i) {
    const Task& task = schedule.tasks[i];
    const Tile& tile = schedule.tiles[task.tile];
    TileAttention attention(problem, plan, tile, task.first_unit);
    if (tile.splits == 1) {
      Partial& partial = thread_workspace.partial;
      attention.run(tile.blocks, partial);
      attention.finish({&partial, 1});
      return;
    }
    SplitTile& split_tile = split_tiles[tile.first_split_tile + task.first_unit / tile.units_of_task];
    std::call_once(split_tile.allocated, [&] { split_tile.partials = std::make_unique<Partial[]>(tile.splits); });
    attention.run(blocks_of_split(tile.blocks, task.split, tile.splits), split_tile.partials[task.split]);
    if (split_tile.finished.fetch_add(1) + 1 == tile.splits) {
      attention.finish({split_tile.partials.get(), std::size_t(tile.splits)});
      split_tile.partials.reset();
    }
  });
}

std::string describe() { return std::string(kernels().name) + ", " + std::to_string(available_threads()) + " threads"; }

}  // namespace mate::cpu
