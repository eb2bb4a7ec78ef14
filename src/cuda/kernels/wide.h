// Attention with wide heads, and with scores of values too (qv): the kernel of forward.h where the sums of a row are
// more than a warpgroup has registers for, or its scores need the values.
//
// A tile is 64 query rows, which both consumers have in common. Each makes scores of half of a block's keys, and sums
// up half of the values' columns. Scheduler and loaders are those of forward.h:
//
// | who                        | does                                               | waits for  | tells     |
// | -------------------------- | -------------------------------------------------- | ---------- | --------- |
// | scheduler, loaders         | as in forward.h; qv is loaded behind q             |            |           |
// | each consumer              | scores = queries x its half of a block's keys      | k.full     | k.empty   |
// |                            | (+ qv x the same keys' values, transposed)         | v.full     | q.empty   |
// |                            | finds its largest score of each row                | the other  | the other |
// |                            | makes weights, relative to the largest of both,    |            |           |
// |                            | and puts them in shared memory                     | the other  | the other |
// |                            | rescales the sums where a row's maximum has grown  |            |           |
// |                            | sums += all weights x its half of the columns      | v.full     | v.empty   |
// |                            | after the last block adds up the row sums of both, | the other  | the other |
// |                            | and stores its columns of out or of a part         |            |           |
//
// So values are read once, though they are multiplied twice. While a block is worked on the next one is on its way:
// with two stages of shared memory, of which qv needs the values of a block from its scores to its sums, nothing is to
// be gained from making scores ahead.
#pragma once

#include "consumer.h"

namespace mate::cuda {

template <ForwardVariant variant>
class WideConsumer : Consumer<variant> {
 public:
  using Consumer<variant>::Consumer;

  __device__ void run() {
    for (TilePlace tile; find_tile(tile); tile.advance()) {
      consume(tile);
      release_tile(tile);
    }
  }

 private:
  static constexpr int block_keys = variant.block_keys;
  static constexpr int keys = variant.consumer_keys();
  static constexpr int columns = variant.consumer_columns();
  static_assert(variant.warpgroups == 2 && keys % 16 == 0 && columns % chunk_columns == 0);

  using ScoreTile = float (&)[keys / 2];
  using Sums = float (&)[columns / 2];
  using OfRows = float (&)[rows_of_thread];

  using typename Consumer<variant>::TilePlace;
  using Consumer<variant>::a_;
  using Consumer<variant>::await;
  using Consumer<variant>::await_queries;
  using Consumer<variant>::find_tile;
  using Consumer<variant>::group_;
  using Consumer<variant>::next_;
  using Consumer<variant>::query_matrix;
  using Consumer<variant>::release_queries_at;
  using Consumer<variant>::release_tile;
  using Consumer<variant>::results_;
  using Consumer<variant>::shared_;
  using Consumer<variant>::work_of;

  __device__ void consume(TilePlace tile) {
    await_queries();
    const BlockRange blocks = work_of(tile).blocks;
#pragma unroll 1
    for (int end = blocks.end; end > blocks.begin;) {
      const int begin = variant.splits ? work_of(tile).begin_of_part(a_.cut, end - 1) : blocks.begin;
      consume_part(tile, {begin, end});
      end = begin;
    }
  }

  __device__ void consume_part(TilePlace tile, BlockRange blocks) {
    float sums[columns / 2] = {};
    float scores[keys / 2];
    float rescale[rows_of_thread];
    float largest[rows_of_thread];
    float others[rows_of_thread];
    OnlineSoftmax softmax(a_.exponent_scale);

#pragma unroll 1
    for (int n = blocks.end - 1; n >= blocks.begin; --n) {
      await(shared_.k, next_);
      if constexpr (variant.qv) await(shared_.v, next_);
      start_scores(scores);
      ptx::wgmma_wait<0>();
      ptx::hold(scores);
      release(shared_.k.empty[next_.stage()]);
      release_queries_at(tile, n);

      this->modify_scores(scores);
      this->hide_keys(scores, work_of(tile), n * block_keys + group_ * keys);
      softmax.template find_largest<keys>(scores, largest);
      exchange(largest, others);
#pragma unroll
      for (int i = 0; i < rows_of_thread; ++i) largest[i] = fmaxf(largest[i], others[i]);
      const bool rescales = softmax.template weigh<keys>(scores, largest, rescale);
      store_weights(scores);
      if (__any_sync(~0U, rescales)) scale_rows<columns>(sums, rescale);
      if constexpr (!variant.qv) await(shared_.v, next_);
      await_other();

      start_values(sums);
      ptx::wgmma_wait<0>();
      ptx::hold(sums);
      release(shared_.v.empty[next_.stage()]);
      next_.advance();
    }

    float sum_of_row[rows_of_thread];
#pragma unroll
    for (int i = 0; i < rows_of_thread; ++i) sum_of_row[i] = softmax.sum(i);
    exchange(sum_of_row, others);
#pragma unroll
    for (int i = 0; i < rows_of_thread; ++i) softmax.set_sum(i, sum_of_row[i] + others[i]);
    await_other();  // it has read them, before others take their place
    results_.write(work_of(tile), blocks.begin, sums, softmax);
  }

  /// Starts scores = queries x this consumer's keys, of q and k and, where it is given, of qv and v.
  __device__ void start_scores(ScoreTile scores) const {
    constexpr int own_rows = keys * chunk_row_bytes;
    const unsigned q = query_matrix();
    const unsigned k = ptx::matrix_at(ptx::shared_address(&shared_.k_tiles[next_.stage()]) + group_ * own_rows);
    const unsigned v = ptx::matrix_at(ptx::shared_address(&shared_.v_tiles[next_.stage()]) + group_ * own_rows);
    ptx::wgmma_fence();
    multiply<variant.head_dim>(scores, q, k, 0);
    if constexpr (variant.qv) {
      constexpr int q_part = chunks_of(variant.head_dim) * variant.tile_rows() * chunk_row_bytes;
      multiply<variant.head_dim_v>(scores, ptx::advance(q, q_part), v, 1);
    }
    ptx::wgmma_commit();
  }

  template <int head_dim>
  __device__ static void multiply(ScoreTile scores, unsigned q, unsigned k, int accumulate) {
#pragma unroll
    for (int step = 0; step < head_dim / 16; ++step) {
      const int chunk = step / 4;
      const int bytes = step % 4 * 32;
      ptx::wgmma<variant.element, keys>(scores, ptx::advance(q, chunk * variant.tile_rows() * chunk_row_bytes + bytes),
                                        ptx::advance(k, chunk * block_keys * chunk_row_bytes + bytes),
                                        accumulate | (step > 0));
    }
  }

  /// Puts this consumer's weights where both read them.
  __device__ void store_weights(const float (&scores)[keys / 2]) const {
    unsigned char* const tile = shared_.weights.tile.rows + accumulator_column() * 2;
#pragma unroll
    for (int i = 0; i < rows_of_thread; ++i) {
#pragma unroll
      for (int j = 0; j < keys / 8; ++j) {
        const unsigned offset = piece_offset<variant.tile_rows()>(accumulator_row(i), group_ * (keys / 8) + j);
        *reinterpret_cast<unsigned*>(tile + offset) =
            pack<variant.element>(scores[4 * j + 2 * i], scores[4 * j + 2 * i + 1]);
      }
    }
    ptx::fence_proxy_async();
  }

  /// Starts sums += weights of all of a block's keys x this consumer's columns of their values.
  __device__ void start_values(Sums sums) const {
    constexpr int chunk_bytes = block_keys * chunk_row_bytes;
    const unsigned p = ptx::matrix_at(ptx::shared_address(&shared_.weights.tile));
    const unsigned v = ptx::matrix_at(
        ptx::shared_address(&shared_.v_tiles[next_.stage()]) + group_ * chunks_of(columns) * chunk_bytes, chunk_bytes);
    ptx::wgmma_fence();
#pragma unroll
    for (int step = 0; step < block_keys / 16; ++step) {
      ptx::wgmma<variant.element, columns, ptx::Major::mn>(
          sums, ptx::advance(p, step / 4 * variant.tile_rows() * chunk_row_bytes + step % 4 * 32),
          ptx::advance(v, step * 16 * chunk_row_bytes), 1);
    }
    ptx::wgmma_commit();
  }

  /// Gives the other consumer a number for each row, and gets its own. A barrier has to stand between two exchanges.
  __device__ void exchange(const float (&mine)[rows_of_thread], OfRows theirs) const {
#pragma unroll
    for (int i = 0; i < rows_of_thread; ++i) {
      if (accumulator_column() == 0) shared_.of_rows[group_ * 64 + accumulator_row(i)] = mine[i];
    }
    await_other();
#pragma unroll
    for (int i = 0; i < rows_of_thread; ++i) theirs[i] = shared_.of_rows[(1 - group_) * 64 + accumulator_row(i)];
  }

  __device__ void await_other() const { ptx::barrier_sync(first_turn_barrier, 256); }
};

template <ForwardVariant variant>
__device__ void wide(const ForwardArguments& a) {
  run<variant, WideConsumer<variant>>(a);
}

}  // namespace mate::cuda
