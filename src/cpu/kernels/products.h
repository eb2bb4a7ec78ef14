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
  typename Isa::Floats sums[Rows][Vectors];

  [[gnu::always_inline]] Tile() {
    for (auto& row : sums) {
      for (auto& sum : row) sum = typename Isa::Floats{};
    }
  }

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
    for_groups<Isa::score_vectors>(
        vectors, [&](int vector, auto vectors_of_tile) __attribute__((always_inline)) {
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

/// Sums weights^T . right up over the lanes `range` of keys, for `vectors` vectors of all rows: calls take(row, vector,
/// sum).
template <typename Isa, typename Operands, typename Right, typename Take>
[[gnu::always_inline]] inline void sum_values(const float* weights, const Right& right, KeyRange range, int rows,
                                              int vectors, const Take& take) {
  for_groups<Isa::sum_vectors>(
      vectors, [&](int vector, auto vectors_of_tile) __attribute__((always_inline)) {
        for_groups<Isa::sum_rows>(
            rows, [&](int row, auto rows_of_tile) __attribute__((always_inline)) {
              const Left left{weights + row, 1, strip_rows};
              Tile<Isa, rows_of_tile(), vectors_of_tile()> tile;
              tile.template multiply<Operands>(left, right, vector, range.begin, range.end);
              for (int r = 0; r < rows_of_tile(); ++r) {
                for (int v = 0; v < vectors_of_tile(); ++v) take(row + r, vector + v, tile.sums[r][v]);
              }
            });
      });
}

template <typename Isa, typename Operands>
void accumulate_packed(const float* weights, const float* values, KeyRange columns, const float* rescale, float* sums,
                       int rows, int width) {
  const KeyRange lanes{columns.begin / Operands::numbers_per_lane, columns.end / Operands::numbers_per_lane};
  using Floats = typename Isa::Floats;
  const auto take = [&](int row, int vector, Floats value) __attribute__((always_inline)) {
    float* sum = sums + std::int64_t{row} * width + vector * Isa::lanes;
    Isa::store(sum, Isa::multiply_add(Isa::broadcast(rescale[row]), Isa::load(sum), value));
  };
  sum_values<Isa, Operands>(weights, PackedRight<Isa>{values, width}, lanes, rows, width / Isa::lanes, take);
}

template <typename Isa>
void sum_placed_values(ElementType type, const float* weights, BlockRows values, KeyRange columns, bool add,
                       float* sums, int stride, int rows, int width) {
  using Floats = typename Isa::Floats;
  using Operands = Float32Operands<Isa>;
  const int vectors = width / Isa::lanes;
  const int rest = width % Isa::lanes;
  const auto take_from = [&](int first_vector) {
    return [=](int row, int vector, Floats value) __attribute__((always_inline)) {
      float* sum = sums + std::int64_t{row} * stride + (first_vector + vector) * Isa::lanes;
      Isa::store(sum, add ? Isa::load(sum) + value : value);
    };
  };
  visit_type(type, [&](auto number) {
    using Number = decltype(number);
    const PlacedRight<Isa, Number> right{values, 0};
    sum_values<Isa, Operands>(weights, right, columns, rows, vectors, take_from(0));
    if (rest > 0) {
      const PlacedRightEnd<Isa, Number> end{{values, vectors * Isa::lanes}, rest};
      sum_values<Isa, Operands>(weights, end, columns, rows, 1, take_from(vectors));
    }
  });
}

template <typename Isa>
void add_block(const float* block, const float* rescale, float* sums, int rows, int width) {
  for (int row = 0; row < rows; ++row) {
    const auto factor = Isa::broadcast(rescale[row]);
    for (int i = row * width; i < (row + 1) * width; i += Isa::lanes) {
      Isa::store(sums + i, Isa::multiply_add(factor, Isa::load(sums + i), Isa::load(block + i)));
    }
  }
}

/// A tile of the products of query rows with keys that lie where they lie, Rows by four keys: the lanes of each vector
/// are parts of one product.
template <typename Isa, int Rows>
struct DotTile {
  static constexpr int keys = dot_keys;
  using Floats = typename Isa::Floats;

  Floats sums[Rows][keys];

  [[gnu::always_inline]] DotTile() {
    for (auto& row : sums) {
      for (auto& sum : row) sum = Floats{};
    }
  }

  [[gnu::always_inline]] void multiply(const float* queries, std::int64_t stride, const Floats (&values)[keys]) {
    for (int r = 0; r < Rows; ++r) {
      const Floats query = Isa::load(queries + r * stride);
      for (int k = 0; k < keys; ++k) sums[r][k] = Isa::multiply_add(query, values[k], sums[r][k]);
    }
  }

  /// scores (keys, strip_rows)[:, :Rows] becomes, or grows by, the products.
  [[gnu::always_inline]] void store(bool add, float* scores) const {
    static_assert(keys == 4);
    if constexpr (Rows == 4) {
      for (int k = 0; k < keys; ++k) {
        const Float4 products = Isa::fold(Isa::sum_quads(sums[0][k], sums[1][k], sums[2][k], sums[3][k]));
        for (int r = 0; r < 4; ++r) store(add, products[r], scores[k * strip_rows + r]);
      }
    } else {
      for (int r = 0; r < Rows; ++r) {
        const Float4 products = Isa::fold(Isa::sum_quads(sums[r][0], sums[r][1], sums[r][2], sums[r][3]));
        for (int k = 0; k < keys; ++k) store(add, products[k], scores[k * strip_rows + r]);
      }
    }
  }

 private:
  [[gnu::always_inline]] static void store(bool add, float product, float& score) {
    score = add ? score + product : product;
  }
};

template <typename Isa>
void dot_scores(ElementType type, BlockRows keys, const float* queries, int stride, KeyRange columns, int rows,
                int depth, bool add, float* scores) {
  constexpr int keys_of_tile = dot_keys;
  const int whole = depth / Isa::lanes * Isa::lanes;
  visit_type(type, [&](auto number) {
    using Number = decltype(number);
    for (int key = columns.begin; key < columns.end; key += keys_of_tile) {
      const Number* key_rows[keys_of_tile];
      for (int k = 0; k < keys_of_tile; ++k) key_rows[k] = reinterpret_cast<const Number*>(keys[key + k]);
      for_groups<Isa::dot_rows>(
          rows, [&](int row, auto rows_of_tile) __attribute__((always_inline)) {
            const float* query = queries + std::int64_t{row} * stride;
            DotTile<Isa, rows_of_tile()> tile;
            typename Isa::Floats values[keys_of_tile];
            for (int i = 0; i < whole; i += Isa::lanes) {
              for (int k = 0; k < keys_of_tile; ++k) values[k] = Isa::load(key_rows[k] + i);
              tile.multiply(query + i, stride, values);
            }
            if (whole < depth) {
              for (int k = 0; k < keys_of_tile; ++k) values[k] = Isa::load_first(key_rows[k] + whole, depth - whole);
              tile.multiply(query + whole, stride, values);
            }
            tile.store(add, scores + key * strip_rows + row);
          });
    }
  });
}

}  // namespace mate::cpu
