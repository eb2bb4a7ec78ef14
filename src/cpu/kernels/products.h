// Products of queries and keys, and of weights and values, in register tiles: a tile of sums stays in registers while
// what is summed over is run through, and every operand that is loaded meets all rows or all vectors of the tile.
#pragma once

#include <algorithm>
#include <type_traits>

#include "cpu/kernels.h"
#include "rows.h"
#include "vectors.h"

namespace mate::cpu {

/// Calls run(first, size) for consecutive groups of `count` things: as many of `Most` as there are, then smaller ones.
/// The size is a compile-time constant.
template <int Most, typename Run>
[[gnu::always_inline]] inline void for_groups(int count, const Run& run, int first = 0) {
  for (; first + Most <= count; first += Most) run(first, std::integral_constant<int, Most>());
  if constexpr (Most > 1) {
    constexpr int less = Most > 4 ? 4 : Most > 2 ? 2 : 1;
    for_groups<less>(count, run, first);
  }
}

/// The left operand of a product: one number, broadcast, for each row of the tile.
struct Left {
  const float* data;
  std::int64_t row_stride;
  std::int64_t step;

  Left from(int row, int i) const { return {data + row * row_stride + i * step, row_stride, step}; }
};

/// The right operand of a product: packed rows of vectors.
template <typename Isa>
struct PackedRight {
  const float* data;
  std::int64_t stride;

  typename Isa::Floats load(int i, int vector) const { return Isa::load(data + i * stride + vector * Isa::lanes); }
};

/// The same from rows of any type that lie where they lie, from number `first` on.
template <typename Isa, typename Number>
struct PlacedRight {
  BlockRows rows;
  int first;

  const Number* at(int i, int vector) const {
    return reinterpret_cast<const Number*>(rows[i]) + first + vector * Isa::lanes;
  }
  typename Isa::Floats load(int i, int vector) const { return Isa::load(at(i, vector)); }
};

/// The same for the last numbers of such rows, fewer than a vector.
template <typename Isa, typename Number>
struct PlacedRightEnd {
  PlacedRight<Isa, Number> rows;
  int count;

  typename Isa::Floats load(int i, int vector) const { return Isa::load_first(rows.at(i, vector), count); }
};

/// A tile of sums: Rows by Vectors.
template <typename Isa, int Rows, int Vectors>
struct Tile {
  typename Isa::Floats sums[Rows][Vectors] = {};

  /// Adds the product of left[:, i] and right[i, vectors from `vector` on], in the order of i.
  template <typename Operands, typename Right>
  [[gnu::always_inline]] void multiply(Left left, const Right& right, int vector, int begin, int end) {
    using Floats = typename Isa::Floats;
    for (int i = begin; i < end; ++i) {
      Floats values[Vectors];
      for (int v = 0; v < Vectors; ++v) values[v] = right.load(i, vector + v);
      for (int r = 0; r < Rows; ++r) {
        const Floats factor = Isa::broadcast(left.data[r * left.row_stride + i * left.step]);
        for (int v = 0; v < Vectors; ++v) sums[r][v] = Operands::multiply_add(factor, values[v], sums[r][v]);
      }
    }
  }
};

template <typename Isa, typename Operands>
void multiply_scores(const float* keys, const float* queries, KeyRange columns, int rows, int depth, float* scores) {
  static_assert(key_step % Isa::score_keys == 0 && strip_rows % Isa::lanes == 0);
  // A wide head is summed in parts: the rounding of one long chain of additions would show.
  constexpr int part = 128;
  const int vectors = (rows + Isa::lanes - 1) / Isa::lanes;
  for (int begin = 0; begin < depth; begin += part) {
    const int end = std::min(begin + part, depth);
    for_groups<Isa::score_vectors>(vectors, [&](int vector, auto vectors_of_tile) {
      const PackedRight<Isa> right{queries, strip_rows};
      for (int key = columns.begin; key < columns.end; key += Isa::score_keys) {
        const Left left{keys + std::int64_t{key} * depth, depth, 1};
        Tile<Isa, Isa::score_keys, vectors_of_tile()> tile;
        tile.template multiply<Operands>(left, right, vector, begin, end);
        for (int r = 0; r < Isa::score_keys; ++r) {
          for (int v = 0; v < vectors_of_tile(); ++v) {
            float* score = scores + (key + r) * strip_rows + (vector + v) * Isa::lanes;
            Isa::store(score, begin == 0 ? tile.sums[r][v] : Isa::load(score) + tile.sums[r][v]);
          }
        }
      }
    });
  }
}

/// Adds weights^T . right over the lanes `range` of keys to rescaled sums (rows, stride), for `vectors` vectors.
/// before_tile() is called before each tile of sums.
template <typename Isa, typename Operands, typename Right, typename BeforeTile>
[[gnu::always_inline]] inline void accumulate_vectors(const float* weights, const Right& right, KeyRange range,
                                                      const float* rescale, float* sums, std::int64_t stride, int rows,
                                                      int vectors, const BeforeTile& before_tile) {
  for_groups<Isa::sum_vectors>(vectors, [&](int vector, auto vectors_of_tile) {
    for_groups<Isa::sum_rows>(rows, [&](int row, auto rows_of_tile) {
      const Left left{weights + row, 1, strip_rows};
      Tile<Isa, rows_of_tile(), vectors_of_tile()> tile;
      before_tile();
      tile.template multiply<Operands>(left, right, vector, range.begin, range.end);
      for (int r = 0; r < rows_of_tile(); ++r) {
        const auto factor = Isa::broadcast(rescale[row + r]);
        for (int v = 0; v < vectors_of_tile(); ++v) {
          float* sum = sums + (row + r) * stride + (vector + v) * Isa::lanes;
          Isa::store(sum, Isa::multiply_add(factor, Isa::load(sum), tile.sums[r][v]));
        }
      }
    });
  });
}

template <typename Isa, typename Operands>
void accumulate_packed(const float* weights, const float* values, KeyRange columns, const float* rescale, float* sums,
                       int rows, int width) {
  const KeyRange lanes{columns.begin / Operands::numbers_per_lane, columns.end / Operands::numbers_per_lane};
  accumulate_vectors<Isa, Operands>(weights, PackedRight<Isa>{values, width}, lanes, rescale, sums, width, rows,
                                    width / Isa::lanes, [] {});
}

/// Fetches one row into the cache, where there are rows.
template <typename Isa>
[[gnu::always_inline]] inline void prefetch(BlockRows rows, int key) {
  if (rows.bytes == 0) return;
  constexpr int line = 64;
  const char* row = rows[key];
  for (int byte = 0; byte < rows.bytes; byte += line) __builtin_prefetch(row + byte, 0, 2);
}

template <typename Isa>
void accumulate_placed(ElementType type, const float* weights, BlockRows values, KeyRange columns, const float* rescale,
                       float* sums, int stride, int rows, int width, BlockRows next, KeyRange next_columns) {
  const int vectors = width / Isa::lanes;
  const int rest = width % Isa::lanes;
  visit_type(type, [&](auto number) {
    using Number = decltype(number);
    using Operands = Float32Operands<Isa>;
    const PlacedRight<Isa, Number> right{values, 0};
    // The rows that are needed next are fetched a few at a time, between the tiles.
    const int tiles =
        std::max(1, (vectors + Isa::sum_vectors - 1) / Isa::sum_vectors) * ((rows + Isa::sum_rows - 1) / Isa::sum_rows);
    const int share = (next_columns.size() + tiles - 1) / tiles;
    int fetched = next_columns.begin;
    const auto fetch_some = [&] {
      for (const int end = std::min(fetched + share, next_columns.end); fetched < end; ++fetched) {
        prefetch<Isa>(next, fetched);
      }
    };
    accumulate_vectors<Isa, Operands>(weights, right, columns, rescale, sums, stride, rows, vectors, fetch_some);
    if (rest > 0) {
      const PlacedRightEnd<Isa, Number> end{{values, vectors * Isa::lanes}, rest};
      accumulate_vectors<Isa, Operands>(weights, end, columns, rescale, sums + vectors * Isa::lanes, stride, rows, 1,
                                        fetch_some);
    }
  });
}

/// Sums of the lanes of four vectors.
template <typename Isa>
Float4 sum_lanes(const typename Isa::Floats (&vectors)[4]) {
  const Float4 a = Isa::fold(vectors[0]);
  const Float4 b = Isa::fold(vectors[1]);
  const Float4 c = Isa::fold(vectors[2]);
  const Float4 d = Isa::fold(vectors[3]);
  const Float4 ab = __builtin_shufflevector(a, b, 0, 4, 1, 5) + __builtin_shufflevector(a, b, 2, 6, 3, 7);
  const Float4 cd = __builtin_shufflevector(c, d, 0, 4, 1, 5) + __builtin_shufflevector(c, d, 2, 6, 3, 7);
  return __builtin_shufflevector(ab, cd, 0, 1, 4, 5) + __builtin_shufflevector(ab, cd, 2, 3, 6, 7);
}

template <typename Isa>
void dot_scores(ElementType type, BlockRows keys, const float* queries, int stride, KeyRange columns, int rows,
                int depth, bool add, float* scores, BlockRows next) {
  constexpr int keys_of_tile = 4;
  const int whole = depth / Isa::lanes * Isa::lanes;
  visit_type(type, [&](auto number) {
    using Number = decltype(number);
    for (int key = columns.begin; key < columns.end; key += keys_of_tile) {
      const Number* key_rows[keys_of_tile];
      for (int k = 0; k < keys_of_tile; ++k) {
        key_rows[k] = reinterpret_cast<const Number*>(keys[key + k]);
        prefetch<Isa>(next, key + k);
      }
      for_groups<Isa::dot_rows>(rows, [&](int row, auto rows_of_tile) {
        using Floats = typename Isa::Floats;
        const float* query = queries + std::int64_t{row} * stride;
        Floats sums[rows_of_tile()][keys_of_tile] = {};
        const auto multiply = [&](int i, const Floats(&values)[keys_of_tile]) {
          for (int r = 0; r < rows_of_tile(); ++r) {
            const Floats factor = Isa::load(query + r * stride + i);
            for (int k = 0; k < keys_of_tile; ++k) sums[r][k] = Isa::multiply_add(factor, values[k], sums[r][k]);
          }
        };
        for (int i = 0; i < whole; i += Isa::lanes) {
          Floats values[keys_of_tile];
          for (int k = 0; k < keys_of_tile; ++k) values[k] = Isa::load(key_rows[k] + i);
          multiply(i, values);
        }
        if (whole < depth) {
          Floats values[keys_of_tile];
          for (int k = 0; k < keys_of_tile; ++k) values[k] = Isa::load_first(key_rows[k] + whole, depth - whole);
          multiply(whole, values);
        }
        for (int r = 0; r < rows_of_tile(); ++r) {
          const Float4 products = sum_lanes<Isa>(sums[r]);
          for (int k = 0; k < keys_of_tile; ++k) {
            float& score = scores[(key + k) * strip_rows + row + r];
            score = add ? score + products[k] : products[k];
          }
        }
      });
    }
  });
}

}  // namespace mate::cpu
