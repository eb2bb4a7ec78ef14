// Attention of a few query rows over keys of e4m3: decoding, whose speed is that of reading memory once.
//
// Keys and values stay as they are fetched until they are in registers, and are widened there. Each warp of consumers
// has keys of its own in every block, and sums of its own, so that warps wait for nothing but memory until a tile ends;
// then their sums are merged. Scheduler and loaders are those of forward.h:
//
// | who                  | does                                                        | waits for | tells     |
// | -------------------- | ----------------------------------------------------------- | --------- | --------- |
// | scheduler, loaders   | as in forward.h                                             |           |           |
// | each warp, of a tile | takes its queries into registers, as float16                | q.full    | q.empty   |
// | of each block        | scores = queries x its keys                                 | k.full    | k.empty   |
// |                      | makes weights of them                                       |           |           |
// |                      | sums += values, transposed, x weights                       | v.full    | v.empty   |
// | after the last block | puts its sums in shared memory, waits for the other warps,  |           |           |
// |                      | and merges those of some rows: to out, or to a part of them |           |           |
//
// What a lane needs for a product lies side by side in a row, 16 bytes for four steps of K or for 16 columns: which
// column of a head is which of a product's does not matter as long as both operands agree. Which key is which of eight
// does not either: they are ordered so that no two lanes read from one bank.
#pragma once

#include "consumer.h"
#include "ptx/mma.h"

namespace mate::cuda {

/// So many bytes, side by side in memory.
template <int bytes>
struct PieceOf;
template <>
struct PieceOf<16> {
  using Type = uint4;
};
template <>
struct PieceOf<8> {
  using Type = uint2;
};
__device__ inline unsigned word_of(const uint4& piece, int i) {
  return i == 0 ? piece.x : i == 1 ? piece.y : i == 2 ? piece.z : piece.w;
}
__device__ inline unsigned word_of(const uint2& piece, int i) { return i == 0 ? piece.x : piece.y; }

template <ForwardVariant variant>
class StreamConsumer : Consumer<variant> {
 public:
  __device__ StreamConsumer(const ForwardArguments& arguments, ForwardShared<variant>& shared, int group)
      : Consumer<variant>(arguments, shared, group), warp_(group * 4 + static_cast<int>(threadIdx.x % 128 / 32)) {}

  __device__ void run() {
    for (TilePlace tile; find_tile(tile); tile.advance()) {
      consume(tile);
      release_tile(tile);
    }
  }

 private:
  static constexpr int warps = variant.stream_warps();
  static constexpr int keys = variant.block_keys / warps;    // of a warp
  static constexpr int rounds = variant.head_dim / 64;       // of four steps of K: what 16 bytes of each lane are
  static constexpr int row_tiles = variant.tile_rows() / 8;  // of columns of a product with weights
  static constexpr int own_columns = variant.head_dim_v < 128 ? 8 : 16;  // of values, side by side, that a lane takes
  static constexpr int value_rounds = variant.head_dim_v / (8 * own_columns);
  static constexpr int value_tiles = own_columns / 2;  // of rows of such a product, in a round
  static_assert(variant.types.key == ElementType::float8_e4m3 && keys % 16 == 0);
  static_assert(variant.head_dim % 64 == 0 && variant.head_dim_v % (8 * own_columns) == 0);

  using typename Consumer<variant>::TilePlace;
  using Sums = float (&)[value_rounds][value_tiles][row_tiles][4];
  using Consumer<variant>::a_;
  using Consumer<variant>::await;
  using Consumer<variant>::await_queries;
  using Consumer<variant>::begin_softmax;
  using Consumer<variant>::find_tile;
  using Consumer<variant>::next_;
  using Consumer<variant>::queries_of;
  using Consumer<variant>::release_tile;
  using Consumer<variant>::results_;
  using Consumer<variant>::shared_;
  using Consumer<variant>::work_of;

  /// The rows of a tile that a lane has, as first operands, and what they see.
  struct Queries {
    unsigned steps[rounds * 4][4];
    float factor[rows_of_thread];  ///< what they were divided by, to fit float16
    KeyRange visible[rows_of_thread];
  };

  // A lane's place in products.
  __device__ static int lane_row() { return static_cast<int>(threadIdx.x % 32 / 4); }
  __device__ static int lane_step() { return static_cast<int>(threadIdx.x % 4); }

  /// The key that is number n of eight.
  __device__ static int key_of(int n) { return ((n ^ n >> 2) & 1) << 2 | (n & 2) | n >> 2; }
  /// The keys of a lane's scores, and of its weights.
  __device__ static ScoreColumns score_columns() {
    const int first = key_of(2 * lane_step());
    return {first, (first ^ 4) - first};
  }

  __device__ void consume(TilePlace tile) {
    Queries queries;
    await_queries(tile);
    load_queries(tile, queries);
    release_read<variant>(shared_.q.empty[queries_of(tile).stage()]);
    find_visible(work_of(tile), queries);
    this->for_each_part(tile, [&](BlockRange blocks) { consume_part(tile, queries, blocks); });
  }

  __device__ void consume_part(TilePlace tile, const Queries& queries, BlockRange blocks) {
    float sums[value_rounds][value_tiles][row_tiles][4] = {};
    OnlineSoftmax softmax = begin_softmax(tile);
#pragma unroll 1
    for (int n = blocks.end - 1; n >= blocks.begin; --n) {
      add_block(tile, n, queries, softmax, sums);
      next_.advance();
    }
    write(tile, blocks.begin, softmax, sums);
  }

  /// Adds this warp's keys of block n.
  __device__ void add_block(TilePlace tile, int n, const Queries& queries, OnlineSoftmax& softmax, Sums sums) {
    const TileWork& work = work_of(tile);
    const int first_row = warp_ * keys;
    const int first_key = n * variant.block_keys + first_row;
    float scores[keys / 2];
    await(shared_.k, next_);
    multiply(queries, shared_.k_tiles[next_.stage()].rows + first_row * chunk_row_bytes, scores);
    release_read<variant>(shared_.k.empty[next_.stage()]);

    if constexpr (variant.types.query == ElementType::bfloat16) {
#pragma unroll
      for (int i = 0; i < keys / 2; ++i) scores[i] *= queries.factor[i / 2 % 2];
    }
    this->modify_scores(scores, tile);
    const KeyRange* const visible = queries.visible;
    if (first_key + keys > work.seen_by_all.end) {
      hide_keys_from<keys>(scores, visible[0].end - first_key, visible[1].end - first_key, score_columns());
    }
    if (first_key < work.seen_by_all.begin) {
      hide_keys_before<keys>(scores, visible[0].begin - first_key, visible[1].begin - first_key, score_columns());
    }
    float rescale[rows_of_thread];
    const bool rescales = softmax.template update<keys>(scores, rescale);
    if (__any_sync(~0U, rescales)) scale_columns(sums, rescale);

    await(shared_.v, next_);
    unsigned char* const values = shared_.v_tiles[next_.stage()].rows + first_row * chunk_row_bytes;
    if (first_key < work.seen.begin || first_key + keys > work.seen.end) clear_unseen(values, work.seen, first_key);
    add_values(values, scores, sums);
    release_read<variant>(shared_.v.empty[next_.stage()]);
  }

  // Rows of this warp in a tile begin where the pattern of a swizzled tile does.

  /// scores = queries x keys.
  __device__ static void multiply(const Queries& queries, const unsigned char* tile, float (&scores)[keys / 2]) {
    const int key = key_of(lane_row());
#pragma unroll
    for (int j = 0; j < keys / 8; ++j) {
      float products[4] = {};
#pragma unroll
      for (int round = 0; round < rounds; ++round) {
        const auto* const piece = tile + piece_offset<variant.block_keys>(8 * j + key, 4 * round + lane_step());
        uint4 halves[2];
        widen_piece<variant.element()>(*reinterpret_cast<const uint4*>(piece), halves);
        ptx::mma(products, queries.steps[4 * round], halves[0].x, halves[0].y);
        ptx::mma(products, queries.steps[4 * round + 1], halves[0].z, halves[0].w);
        ptx::mma(products, queries.steps[4 * round + 2], halves[1].x, halves[1].y);
        ptx::mma(products, queries.steps[4 * round + 3], halves[1].z, halves[1].w);
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) scores[4 * j + i] = products[i];
    }
  }

  /// sums += values, transposed, x weights.
  __device__ static void add_values(const unsigned char* tile, const float (&weights)[keys / 2], Sums sums) {
    using Piece = typename PieceOf<own_columns>::Type;
    const int first = score_columns().first;
#pragma unroll
    for (int step = 0; step < keys / 16; ++step) {
      unsigned b[row_tiles][2];
#pragma unroll
      for (int i = 0; i < row_tiles; ++i) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const float* const of_eight = weights + 4 * (2 * step + half) + 2 * i;
          b[i][half] = pack<variant.element()>(of_eight[0], of_eight[1]);
        }
      }
#pragma unroll
      for (int round = 0; round < value_rounds; ++round) {
        Piece rows[4];  // of the keys that this lane has weights of
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int row = 16 * step + i / 2 * 8 + (first ^ i % 2 * 4);
          const int byte = (round * 8 + lane_row()) * own_columns;
          rows[i] = *reinterpret_cast<const Piece*>(tile + byte_offset<variant.block_keys>(row, byte));
        }
#pragma unroll
        for (int word = 0; word < own_columns / 4; ++word) {
          // Two columns of both keys in a word, those of the other two in another.
          unsigned pairs[2][2];
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            const unsigned even = word_of(rows[2 * half], word);
            const unsigned odd = word_of(rows[2 * half + 1], word);
            pairs[0][half] = __byte_perm(even, odd, 0x5140);
            pairs[1][half] = __byte_perm(even, odd, 0x7362);
          }
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            const unsigned a[4] = {widen_pair<variant.element()>(static_cast<unsigned short>(pairs[i][0])),
                                   widen_pair<variant.element()>(static_cast<unsigned short>(pairs[i][0] >> 16)),
                                   widen_pair<variant.element()>(static_cast<unsigned short>(pairs[i][1])),
                                   widen_pair<variant.element()>(static_cast<unsigned short>(pairs[i][1] >> 16))};
#pragma unroll
            for (int r = 0; r < row_tiles; ++r) ptx::mma(sums[round][2 * word + i][r], a, b[r][0], b[r][1]);
          }
        }
      }
    }
  }

  /// Multiplies sums, whose columns are query rows, by what belongs to rows of scores.
  __device__ static void scale_columns(Sums sums, const float (&factor)[rows_of_thread]) {
#pragma unroll
    for (int r = 0; r < row_tiles; ++r) {
      float of_column[2];
#pragma unroll
      for (int c = 0; c < 2; ++c) of_column[c] = __shfl_sync(~0U, factor[r], (2 * lane_step() + c) * 4);
#pragma unroll
      for (int round = 0; round < value_rounds; ++round) {
#pragma unroll
        for (int j = 0; j < value_tiles; ++j) {
#pragma unroll
          for (int i = 0; i < 4; ++i) sums[round][j][r][i] *= of_column[i % 2];
        }
      }
    }
  }

  /// Values that no row of the sequence sees must not meet weights of 0, since they may be NaN.
  __device__ static void clear_unseen(unsigned char* tile, KeyRange seen, int first_key) {
    clear_rows<variant.block_keys, 1>(tile, variant.head_dim_v, 0, clamp(seen.begin - first_key, 0, keys));
    clear_rows<variant.block_keys, 1>(tile, variant.head_dim_v, clamp(seen.end - first_key, 0, keys), keys);
    if constexpr (!variant.gather) ptx::fence_proxy_async();  // the copy engine will write there
    __syncwarp();
  }

  /// This warp's part in merging the sums of all, which end with block `begin`.
  __device__ void write(TilePlace tile, int begin, const OnlineSoftmax& softmax, Sums sums) {
    auto& all = shared_.warp_results;
    results_.await_others();  // they have read what was there before
#pragma unroll
    for (int i = 0; i < row_tiles; ++i) {
      const float2 weight = softmax.partial(i);
      if (lane_step() == 0) all.weights[warp_][8 * i + lane_row()] = weight;
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        float* const row = all.sums[warp_][8 * i + 2 * lane_step() + c];
#pragma unroll
        for (int round = 0; round < value_rounds; ++round) {
          float* const columns = row + (round * 8 + lane_row()) * own_columns;
#pragma unroll
          for (int j = 0; j < value_tiles; j += 2) {
            *reinterpret_cast<float4*>(columns + 2 * j) = make_float4(
                sums[round][j][i][c], sums[round][j][i][2 + c], sums[round][j + 1][i][c], sums[round][j + 1][i][2 + c]);
          }
        }
      }
    }
    results_.await_others();
    results_.write_merged(
        work_of(tile), begin, warps, this->value_factor(tile),
        [&](int warp, int row) {
          const float2 weight = all.weights[warp][row];
          return PartWeight{weight.x, weight.y};
        },
        [&](int warp, int row, int column) { return *reinterpret_cast<const float4*>(all.sums[warp][row] + column); });
  }

  __device__ void find_visible(const TileWork& work, Queries& queries) const {
#pragma unroll
    for (int i = 0; i < rows_of_thread; ++i) {
      const int query = min(place_of(a_, work, lane_row() + 8 * i).query, work.used - 1);
      queries.visible[i] = visible_keys(a_.problem.mask, work.place.lengths, query);
    }
  }

  /// Takes a tile's queries from shared memory, as float16.
  __device__ void load_queries(TilePlace tile, Queries& queries) const {
    const unsigned char* const rows = shared_.q_tiles[queries_of(tile).stage()].rows;
#pragma unroll
    for (int i = 0; i < rows_of_thread; ++i) {
      queries.factor[i] = 1;
      unsigned words[rounds][8] = {};
      if (i < row_tiles) {
#pragma unroll
        for (int round = 0; round < rounds; ++round) {
          load_query_columns(rows, lane_row() + 8 * i, 16 * (4 * round + lane_step()), words[round]);
        }
        if constexpr (variant.types.query == ElementType::bfloat16) queries.factor[i] = fit_float16(words);
      }
#pragma unroll
      for (int step = 0; step < rounds * 4; ++step) {
        queries.steps[step][i] = words[step / 4][step % 4 * 2];
        queries.steps[step][i + 2] = words[step / 4][step % 4 * 2 + 1];
      }
    }
  }

  /// Sixteen columns of a row, as they are but for e4m3, which is widened.
  __device__ static void load_query_columns(const unsigned char* tile, int row, int column, unsigned (&words)[8]) {
    constexpr int bytes = variant.query_bytes();
    uint4 halves[2];
    const auto piece = [&](int i) {
      return *reinterpret_cast<const uint4*>(tile + byte_offset<variant.tile_rows()>(row, column * bytes + 16 * i));
    };
    if constexpr (bytes == 1) {
      widen_piece<variant.element()>(piece(0), halves);
    } else {
      halves[0] = piece(0);
      halves[1] = piece(1);
    }
#pragma unroll
    for (int i = 0; i < 8; ++i) words[i] = word_of(halves[i / 4], i % 4);
  }

  /// Makes float16 of the bfloat16 of a row, which are divided by a power of two so that the largest of them fits: what
  /// is then too small for float16 is so beside that one. Returns the power.
  __device__ static float fit_float16(unsigned (&words)[rounds][8]) {
    float largest = 0;
#pragma unroll
    for (int i = 0; i < rounds * 8; ++i) {
      const unsigned word = words[i / 8][i % 8];
      largest = fmaxf(largest, fmaxf(fabsf(__int_as_float(word << 16)), fabsf(__int_as_float(word & 0xffff0000U))));
    }
    // 2**14 times a number from 1 to 2 is a float16; this power and its reciprocal are normal numbers.
    const int exponent = max((__float_as_int(quad_max(largest)) >> 23) - 127, -112) - 14;
    const float divisor = __int_as_float((127 + exponent) << 23);
    const float multiplier = __int_as_float((127 - exponent) << 23);
#pragma unroll
    for (int i = 0; i < rounds * 8; ++i) {
      unsigned& word = words[i / 8][i % 8];
      word = pack<ElementType::float16>(__int_as_float(word << 16) * multiplier,
                                        __int_as_float(word & 0xffff0000U) * multiplier);
    }
    return divisor;
  }

  int warp_;
};

template <ForwardVariant variant>
__device__ void stream(const ForwardArguments& a) {
  run<variant, StreamConsumer<variant>>(a);
}

}  // namespace mate::cuda
