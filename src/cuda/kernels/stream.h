// Attention of a few query rows: decoding, whose speed is that of reading memory once.
//
// Each warp of consumers has keys of its own in every block, and sums of its own, so that warps wait for nothing but
// memory until a tile ends; then their sums are merged. Keys and values of e4m3 stay as they are fetched until they are
// in registers, and are widened there: see stream_products.h. Scheduler and loaders are those of forward.h:
//
// | who                  | does                                                        | waits for | tells     |
// | -------------------- | ----------------------------------------------------------- | --------- | --------- |
// | scheduler, loaders   | as in forward.h                                             |           |           |
// | each warp, of a tile | takes its queries into registers                            | q.full    | q.empty   |
// | of each block        | scores = its keys x queries, transposed                     | k.full    | k.empty   |
// |                      | makes weights of them                                       |           |           |
// |                      | sums += values, transposed, x weights                       | v.full    | v.empty   |
// | after the last block | puts its sums in shared memory, waits for the other warps,  |           |           |
// |                      | and merges those of some rows: to out, or to a part of them |           |           |
#pragma once

#include "consumer.h"
#include "stream_products.h"

namespace mate::cuda {

template <ForwardVariant variant>
class StreamConsumer : Consumer<variant> {
 public:
  __device__ StreamConsumer(const ForwardArguments& arguments, ForwardShared<variant>& shared, int group)
      : Consumer<variant>(arguments, shared, group),
        warp_(group * 4 + static_cast<int>(threadIdx.x % 128 / 32)),
        key_rows_(warp_ * keys, arguments.box_keys),
        value_rows_(warp_ * keys, arguments.box_keys) {}

  __device__ void run() {
    for (TilePlace tile; find_tile(tile); tile.advance()) {
      consume(tile);
      release_tile(tile);
    }
  }

 private:
  using Products = StreamProducts<variant>;
  static constexpr int keys = Products::keys;  // of a warp
  static constexpr int row_tiles = Products::row_tiles;
  static constexpr int words_of_row = 2 * Products::steps;  // of a query, in each of four lanes

  using typename Consumer<variant>::TilePlace;
  using Sums = typename Products::Sums;
  using Consumer<variant>::a_;
  using Consumer<variant>::await;
  using Consumer<variant>::await_queries;
  using Consumer<variant>::find_tile;
  using Consumer<variant>::next_;
  using Consumer<variant>::queries_of;
  using Consumer<variant>::release_tile;
  using Consumer<variant>::results_;
  using Consumer<variant>::shared_;
  using Consumer<variant>::work_of;

  using Softmax = OnlineSoftmaxOf<EveryFourth>;
  /// Of a lane's two rows of every eight.
  template <typename T>
  using OfRows = T[row_tiles][rows_of_thread];

  /// The rows of a tile as operands, and what a lane's rows see.
  struct Queries {
    typename Products::Queries words;
    OfRows<float> factor;  ///< what they were divided by, to fit float16
    OfRows<KeyRange> visible;
  };
  using Softmaxes = Softmax[row_tiles];

  __device__ void consume(TilePlace tile) {
    Queries queries;
    await_queries(tile);
    load_queries(tile, queries);
    release_read<variant>(shared_.q.empty[queries_of(tile).stage()]);
    find_visible(work_of(tile), queries);
    this->for_each_part(tile, [&](BlockRange blocks) { consume_part(tile, queries, blocks); });
  }

  __device__ void consume_part(TilePlace tile, const Queries& queries, BlockRange blocks) {
    Sums sums = {};
    Softmaxes softmax;
#pragma unroll
    for (Softmax& of_eight : softmax) of_eight = this->template begin_softmax<Softmax>(tile);
#pragma unroll 1
    for (int n = blocks.end - 1; n >= blocks.begin; --n) {
      add_block(tile, n, queries, softmax, sums);
      next_.advance();
    }
    write(tile, blocks.begin, softmax, sums);
  }

  /// Adds this warp's keys of block n.
  __device__ void add_block(TilePlace tile, int n, const Queries& queries, Softmaxes& softmax, Sums& sums) {
    const TileWork& work = work_of(tile);
    const int first_key = n * variant.block_keys + warp_ * keys;
    typename Products::Scores scores[row_tiles];
    await(shared_.k, next_);
    Products::multiply(queries.words, shared_.k_tiles[next_.stage()].rows, key_rows_, scores);
    release_read<variant>(shared_.k.empty[next_.stage()]);

    const bool hides = first_key + keys > work.seen_by_all.end || first_key < work.seen_by_all.begin;
#pragma unroll
    for (int r = 0; r < row_tiles; ++r) {
      if constexpr (variant.fits_queries()) {
#pragma unroll
        for (int i = 0; i < keys / 4; ++i) scores[r][i] *= queries.factor[r][i / 2 % 2];
      }
      this->modify_scores(scores[r], tile);
      if (hides) {
        const KeyRange(&visible)[rows_of_thread] = queries.visible[r];
        hide_keys_from<keys / 2>(scores[r], visible[0].end - first_key, visible[1].end - first_key, score_columns());
        hide_keys_before<keys / 2>(scores[r], visible[0].begin - first_key, visible[1].begin - first_key,
                                   score_columns());
      }
      float rescale[rows_of_thread];
      const bool rescales = softmax[r].template update<keys / 2>(scores[r], rescale);
      if (__any_sync(~0U, rescales)) Products::scale(sums, r, rescale);
    }

    await(shared_.v[0], next_);
    unsigned char* const values = shared_.v_tiles[next_.stage()].rows;
    if (first_key < work.seen.begin || first_key + keys > work.seen.end) {
      clear_unseen(values, pieces_of(variant.head_dim_v, variant.key_bytes()), work.seen, first_key, keys,
                   [&](int row, int piece) { return value_rows_.piece(row, piece); });
      if constexpr (!variant.gather) ptx::fence_proxy_async();  // the copy engine will write there
      __syncwarp();
    }
    Products::add_values(values, value_rows_, scores, sums);
    release_read<variant>(shared_.v[0].empty[next_.stage()]);
  }

  /// This warp's part in merging the sums of all, which end with block `begin`.
  __device__ void write(TilePlace tile, int begin, const Softmaxes& softmax, const Sums& sums) {
    auto& all = shared_.warp_results;
    results_.await_others();  // they have read what was there before
#pragma unroll
    for (int r = 0; r < row_tiles; ++r) {
#pragma unroll
      for (int i = 0; i < rows_of_thread; ++i) {
        const float2 weight = softmax[r].partial(i);
        if (lane_row() == 0) all.weights[warp_][row_of(r, i)] = weight;
      }
    }
    Products::store(sums, all.sums[warp_]);
    results_.await_others();
    results_.write_merged(
        work_of(tile), begin, this->value_factor(tile),
        [&](int warp, int row) {
          const float2 weight = all.weights[warp][row];
          return PartWeight{weight.x, weight.y};
        },
        [&](int warp, int row, int column) { return *reinterpret_cast<const float4*>(all.sums[warp][row] + column); });
  }

  /// A lane's row i of eight.
  __device__ static int row_of(int row_tile, int i) { return 8 * row_tile + 2 * lane_step() + i; }

  __device__ void find_visible(const TileWork& work, Queries& queries) const {
#pragma unroll
    for (int r = 0; r < row_tiles; ++r) {
#pragma unroll
      for (int i = 0; i < rows_of_thread; ++i) {
        const int query = min(place_of(a_, work, row_of(r, i)).query, work.used - 1);
        queries.visible[r][i] = visible_keys(a_.problem.mask, work.place.lengths, query);
      }
    }
  }

  /// Takes a tile's queries from shared memory, as what is multiplied.
  __device__ void load_queries(TilePlace tile, Queries& queries) const {
    const unsigned char* const rows = shared_.q_tiles[queries_of(tile).stage()].rows;
#pragma unroll
    for (int r = 0; r < row_tiles; ++r) {
      unsigned words[words_of_row];
#pragma unroll
      for (int piece = 0; piece < Products::pieces; ++piece) {
        load_query_columns(rows, lane_row() + 8 * r, Products::column_of_piece(piece),
                           words + piece * Products::piece_words);
      }
      if constexpr (variant.fits_queries()) {
        const float factor = fit_float16(words);
#pragma unroll
        for (int i = 0; i < rows_of_thread; ++i) {
          queries.factor[r][i] = __shfl_sync(~0U, factor, (2 * lane_step() + i) * 4);
        }
      }
#pragma unroll
      for (int i = 0; i < words_of_row; ++i) queries.words[r][i / 2][i % 2] = words[i];
    }
  }

  /// As many columns of a row as a piece of a key has, as they are but for e4m3, which is widened.
  __device__ static void load_query_columns(const unsigned char* tile, int row, int column, unsigned* words) {
    constexpr int bytes = variant.query_bytes();
    const auto piece = [&](int i) {
      return *reinterpret_cast<const uint4*>(tile + byte_offset<variant.tile_rows()>(row, column * bytes + 16 * i));
    };
    uint4 halves[2];
    if constexpr (bytes == 1) {
      widen_piece<variant.element()>(piece(0), halves);
    } else {
#pragma unroll
      for (int i = 0; i < Products::piece_words / 4; ++i) halves[i] = piece(i);
    }
#pragma unroll
    for (int i = 0; i < Products::piece_words; ++i) words[i] = word_of(halves[i / 4], i % 4);
  }

  /// Makes float16 of the bfloat16 of a row. Returns what they were divided by.
  __device__ static float fit_float16(unsigned (&words)[words_of_row]) {
    float largest = 0;
#pragma unroll
    for (const unsigned word : words) {
      const float2 pair = unpack<ElementType::bfloat16>(word);
      largest = fmaxf(largest, fmaxf(fabsf(pair.x), fabsf(pair.y)));
    }
    const Float16Fit fit(quad_max(largest));
#pragma unroll
    for (unsigned& word : words) word = fit.round(unpack<ElementType::bfloat16>(word));
    return fit.divisor();
  }

  int warp_;
  typename Products::KeyRows key_rows_;
  typename Products::ValueRows value_rows_;
};

template <ForwardVariant variant>
__device__ __forceinline__ void stream(const ForwardArguments& a) {
  run<variant, StreamConsumer<variant>>(a);
}

}  // namespace mate::cuda
