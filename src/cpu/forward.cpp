#include <algorithm>
#include <atomic>
#include <limits>
#include <memory>
#include <mutex>
#include <numbers>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "backend.h"
#include "kernels.h"
#include "merge.h"
#include "parallel.h"
#include "rotate.h"

namespace mate::cpu {
namespace {

/// A tile of query rows of one sequence, the same for all head units.
struct Tile {
  int b;
  int index;
  BlockRange blocks;
  int splits;
  std::int64_t first_split_tile;  ///< its SplitTile of the first unit, where it has more than one split
};

/// One piece of work: a split of a tile, for the query heads of one unit.
struct Task {
  int tile;
  int unit;
  int split;
};

/// The work of a call.
struct Schedule {
  std::vector<Tile> tiles;
  std::vector<Task> tasks;
  std::int64_t split_tiles = 0;
  double multiplications = 0;
};

Schedule make_schedule(const Problem& problem, const Plan& plan) {
  Schedule schedule;
  const Tiling& tiling = plan.tiling;
  const int units = plan.head_units(problem);
  for (int b = 0; b < problem.batch; ++b) {
    const Lengths lengths = problem.sequence(b).lengths;
    for (int tile = 0; tile < tiles_of(tiling, lengths.sq); ++tile) {
      const BlockRange blocks = blocks_of_tile(tiling, problem.mask, lengths, tile);
      // A split without a block would add nothing.
      const int splits = std::clamp(blocks.size(), 1, plan.splits[b]);
      schedule.tiles.push_back({b, tile, blocks, splits, schedule.split_tiles});
      if (splits > 1) schedule.split_tiles += units;
      schedule.multiplications += double{block_keys} * blocks.size() * rows_of_tile(tiling, lengths.sq, tile).count() *
                                  units * (problem.head_dim + problem.head_dim_v);
    }
  }
  // The longest first: whatever is taken last is short, so that all workers end together.
  std::stable_sort(schedule.tiles.begin(), schedule.tiles.end(), [](const Tile& a, const Tile& b) {
    return std::int64_t{a.blocks.size()} * b.splits > std::int64_t{b.blocks.size()} * a.splits;
  });
  for (int tile = 0; tile < static_cast<int>(schedule.tiles.size()); ++tile) {
    for (int unit = 0; unit < units; ++unit) {
      for (int split = 0; split < schedule.tiles[tile].splits; ++split) schedule.tasks.push_back({tile, unit, split});
    }
  }
  return schedule;
}

/// What the rows of a tile have summed up over the keys of one split.
struct Partial {
  std::vector<float> sums;  ///< (rows, width)
  std::vector<RunningSoftmax> softmax;

  void start(int rows, int width) {
    sums.assign(std::size_t(rows) * width, 0.0F);
    softmax.assign(rows, {-std::numeric_limits<float>::infinity(), 0.0F});
  }
};

/// The splits of one tile and head unit: whichever worker finishes the last of them merges all, always in their order.
struct SplitTile {
  std::once_flag allocated;
  std::unique_ptr<Partial[]> partials;
  std::atomic<int> finished = 0;
};

/// A thread's own memory. It depends on head sizes alone.
struct Workspace {
  std::vector<float> queries;     ///< (rows, depth)
  std::vector<float> key_rows;    ///< (block_keys, d): before they are transposed
  std::vector<float> keys;        ///< (depth, block_keys): transposed
  std::vector<float> values;      ///< (block_keys, width)
  std::vector<float> scores;      ///< (rows, block_keys)
  std::vector<float> row;         ///< one row: a query that is rotated, or the merged sums
  std::vector<float> scratch;     ///< the angles of a rotation, then the rotated query in its own type
  std::vector<KeyRange> visible;  ///< keys that each row sees
  std::vector<float> rescale;
  Partial partial;

  void reserve(int depth, int width) {
    const auto grow = [](std::vector<float>& memory, std::size_t size) {
      if (memory.size() < size) memory.resize(size);
    };
    grow(queries, std::size_t{tile_rows} * depth);
    grow(key_rows, std::size_t{block_keys} * depth);
    grow(keys, std::size_t(depth) * block_keys);
    grow(values, std::size_t{block_keys} * width);
    grow(scores, std::size_t{tile_rows} * block_keys);
    grow(row, std::max(depth, width));
    grow(scratch, std::max(depth, width));
    grow(rescale, tile_rows);
    visible.resize(tile_rows);
  }
};

thread_local Workspace thread_workspace;

/// The attention of one tile of query rows of one head unit over some key blocks.
class TileAttention {
 public:
  TileAttention(const Problem& problem, const Tiling& tiling, const Tile& tile, int unit)
      : problem_(problem),
        kernels_(kernels()),
        workspace_(thread_workspace),
        pack_(tiling.pack),
        b_(tile.b),
        first_head_(unit * pack_),
        key_head_(first_head_ / problem.group()),
        sequence_(problem.sequence(tile.b)),
        rows_(rows_of_tile(tiling, sequence_.lengths.sq, tile.index)),
        keys_(keys_of_tile(tiling, problem.mask, sequence_.lengths, tile.index)),
        depth_(problem.head_dim + (problem.qv.given() ? problem.head_dim_v : 0)),
        width_(static_cast<int>(divide_up(problem.head_dim_v, width_multiple)) * width_multiple) {
    workspace_.reserve(depth_, width_);
  }

  int rows() const { return rows_.count(); }

  void run(BlockRange blocks, Partial& partial) {
    partial.start(rows(), width_);
    if (blocks.size() == 0) return;
    load_queries();
    // The products are scaled when they are finished: scaled queries could overflow where scores do not.
    const float scale = to_base_2(problem_.softcap > 0 ? 1.0F : problem_.softmax_scale);
    for (int row = 0; row < rows(); ++row) {
      workspace_.visible[row] = visible_keys(problem_.mask, sequence_.lengths, query_row(row));
    }
    for (int block = blocks.begin; block < blocks.end; ++block) {
      const int first_key = block * block_keys;
      // Keys of the block that no row of the tile sees are not read.
      const KeyRange columns = columns_of(keys_, first_key);
      load_values(first_key, columns);
      multiply_scores(first_key, columns);
      for (int row = 0; row < rows(); ++row) {
        float* scores = workspace_.scores.data() + row * block_keys;
        if (problem_.softcap > 0) {
          kernels_.cap_scores(scores, problem_.softmax_scale, problem_.softcap, block_keys);
        }
        workspace_.rescale[row] = kernels_.update_softmax(scores, columns_of(workspace_.visible[row], first_key), scale,
                                                          partial.softmax[row]);
      }
      kernels_.accumulate(workspace_.scores.data(), columns, workspace_.values.data(), workspace_.rescale.data(),
                          partial.sums.data(), rows(), width_);
    }
  }

  /// Writes out and lse of the tile from all its parts.
  void finish(std::span<const Partial> partials) {
    std::vector<PartialRow> parts(partials.size());
    float* merged = workspace_.row.data();
    for (int row = 0; row < rows(); ++row) {
      for (std::size_t i = 0; i < partials.size(); ++i) {
        const RunningSoftmax& softmax = partials[i].softmax[row];
        parts[i] = {partials[i].sums.data() + std::int64_t{row} * width_, softmax.max, softmax.sum};
      }
      const int head = query_head(row);
      const float lse = merge_row(parts, sink_of(head), problem_.head_dim_v, merged);
      const std::int64_t out_row = std::int64_t{sequence_.first_q} + query_row(row);
      const int slot = problem_.query_slot(b_);
      kernels_.narrow(merged, problem_.out.type, problem_.out.at(slot, out_row, head), problem_.head_dim_v);
      if (problem_.lse.data != nullptr) problem_.lse.at(slot, head, out_row) = lse;
    }
  }

 private:
  /// The factor that takes natural scores to the base-2 domain, as far as float32 reaches.
  static float to_base_2(float scale) {
    constexpr float largest = std::numeric_limits<float>::max();
    return std::clamp(scale * std::numbers::log2e_v<float>, -largest, largest);
  }

  int query_row(int row) const { return static_cast<int>((rows_.first + row) / pack_); }
  int query_head(int row) const { return first_head_ + static_cast<int>((rows_.first + row) % pack_); }

  static KeyRange columns_of(KeyRange keys, int first_key) {
    return {std::clamp(keys.begin - first_key, 0, block_keys), std::clamp(keys.end - first_key, 0, block_keys)};
  }

  void load_queries() {
    const float descale = problem_.q_descale.at(b_, key_head_);
    const int slot = problem_.query_slot(b_);
    for (int row = 0; row < rows(); ++row) {
      float* target = workspace_.queries.data() + std::int64_t{row} * depth_;
      const std::int64_t q_row = std::int64_t{sequence_.first_q} + query_row(row);
      const void* source = problem_.q.at(slot, q_row, query_head(row));
      if (problem_.rotary.given()) source = rotated_query(source, query_row(row));
      kernels_.widen(problem_.q.type, source, descale, target, problem_.head_dim);
      if (problem_.qv.given()) {
        kernels_.widen(problem_.qv.type, problem_.qv.at(slot, q_row, query_head(row)), descale,
                       target + problem_.head_dim, problem_.head_dim_v);
      }
    }
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

  /// Widens the first `count` elements of the rows of keys first_key + columns to rows of target.
  void load_rows(const Rows& rows, float factor, int count, int first_key, KeyRange columns, float* target,
                 int target_stride) {
    const std::int64_t row_bytes = rows.row_stride * bytes_of(rows.type);
    int column = columns.begin;
    while (column < columns.end) {
      // Rows of one page, or of a cache without pages, lie at one distance from each other.
      const Location first = locate_key(problem_.keys, sequence_, first_key + column);
      const std::int64_t rest = columns.end - column;
      const std::int64_t run =
          problem_.keys.paged() ? std::min<std::int64_t>(rest, problem_.keys.rows - first.row) : rest;
      const char* source = static_cast<const char*>(rows.at(first.slot, first.row, key_head_));
      for (const int end = column + static_cast<int>(run); column < end; ++column, source += row_bytes) {
        kernels_.widen(rows.type, source, factor, target + std::int64_t{column} * target_stride, count);
      }
    }
  }

  void load_values(int first_key, KeyRange columns) {
    load_rows(problem_.v, problem_.v_descale.at(b_, key_head_), problem_.head_dim_v, first_key, columns,
              workspace_.values.data(), width_);
  }

  /// The products of the tile's queries with keys, and of qv with the values, which are loaded already.
  void multiply_scores(int first_key, KeyRange columns) {
    const int head_dim = problem_.head_dim;
    const int head_dim_v = problem_.head_dim_v;
    const float* key_rows = workspace_.key_rows.data();
    const float* values = workspace_.values.data();
    const float* queries = workspace_.queries.data();
    float* scores = workspace_.scores.data();
    load_rows(problem_.k, problem_.k_descale.at(b_, key_head_), head_dim, first_key, columns,
              workspace_.key_rows.data(), head_dim);
    if (rows() == 1) {
      // Transposing the keys would take longer than using them once.
      kernels_.dot_scores(queries, key_rows, head_dim, columns, head_dim, false, scores);
      if (problem_.qv.given()) {
        kernels_.dot_scores(queries + head_dim, values, width_, columns, head_dim_v, true, scores);
      }
      return;
    }
    float* keys = workspace_.keys.data();
    kernels_.transpose(key_rows, head_dim, columns, head_dim, keys);
    if (problem_.qv.given()) {
      // Values lie under the keys, as qv lies behind q: one product serves both.
      kernels_.transpose(values, width_, columns, head_dim_v, keys + std::int64_t{head_dim} * block_keys);
    }
    kernels_.multiply_scores(queries, keys, columns, scores, rows(), depth_);
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
  int first_head_;
  int key_head_;
  Sequence sequence_;
  TileRows rows_;
  KeyRange keys_;
  int depth_;  ///< of the products of queries and keys
  int width_;  ///< of the rows of values and sums, padding included
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

Machine machine() { return {tile_rows, block_keys, available_threads()}; }

void forward(const Problem& problem, const Plan& plan) {
  const Schedule schedule = make_schedule(problem, plan);
  std::vector<SplitTile> split_tiles(schedule.split_tiles);
  clear_unused_rows(problem);
  const int workers = workers_for(schedule.multiplications, plan.workers);
  parallel_for(static_cast<std::int64_t>(schedule.tasks.size()), workers, [&](std::int64_t i) {
    const Task& task = schedule.tasks[i];
    const Tile& tile = schedule.tiles[task.tile];
    TileAttention attention(problem, plan.tiling, tile, task.unit);
    if (tile.splits == 1) {
      Partial& partial = thread_workspace.partial;
      attention.run(tile.blocks, partial);
      attention.finish({&partial, 1});
      return;
    }
    SplitTile& split_tile = split_tiles[tile.first_split_tile + task.unit];
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
