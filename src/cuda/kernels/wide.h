// Attention with wide heads, and with scores of values too (qv): the kernel of forward.h where the sums of a row are
// more than a warpgroup has registers for, or its scores need the values.
//
// A tile is 64 query rows, which both consumers have in common. Blocks of keys are scored by the one and the other in
// turns; each sums up half of the values' columns. Scheduler and loaders are those of forward.h:
//
// | who                        | does                                               | waits for  | tells     |
// | -------------------------- | -------------------------------------------------- | ---------- | --------- |
// | scheduler, loaders         | as in forward.h; qv is loaded behind q             |            |           |
// | a consumer, of its block   | scores = queries x keys                            | k.full     |           |
// |                            | (+ qv x the same keys' values, transposed)         | v.full     |           |
// |                            | makes weights of the scores, and puts them in      |            | k.empty   |
// |                            | shared memory, with what they are relative to      |            | the other |
// |                            | rescales its sums where a row's maximum has grown, |            |           |
// |                            | and sums += weights (in registers) x its columns   | v.full     | v.empty   |
// | of the other's block       | rescales its sums likewise,                        | the other  | k.empty   |
// |                            | and sums += those weights x its columns            | v.full     | v.empty   |
// | after the last block       | both add up the row sums of each other,            | the other  | the other |
// |                            | and store their columns of out or of a part        |            |           |
//
// So scores are products of as many keys as a block has, whose operands shared memory delivers in time, and no consumer
// waits for the other but for its weights. A block is done with as soon as can be, rather than scored ahead: with two
// stages of shared memory (or one), room for what is on its way counts for more than the time of the matrix units.
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
  static constexpr int keys = variant.block_keys;
  static constexpr int columns = variant.consumer_columns();
  static_assert(variant.warpgroups == 2 && keys % 16 == 0 && columns % chunk_columns == 0);

  using typename Consumer<variant>::Sums;
  using typename Consumer<variant>::TilePlace;
  using Consumer<variant>::a_;
  using Consumer<variant>::await;
  using Consumer<variant>::await_queries;
  using Consumer<variant>::begin_softmax;
  using Consumer<variant>::find_tile;
  using Consumer<variant>::group_;
  using Consumer<variant>::key_matrix;
  using Consumer<variant>::next_;
  using Consumer<variant>::query_matrix;
  using Consumer<variant>::release_queries_at;
  using Consumer<variant>::release_tile;
  using Consumer<variant>::results_;
  using Consumer<variant>::shared_;
  using Consumer<variant>::start_scores;
  using Consumer<variant>::start_values;
  using Consumer<variant>::value_matrix;
  using Consumer<variant>::work_of;

  __device__ void consume(TilePlace tile) {
    await_queries(tile);
    this->for_each_part(tile, [&](BlockRange blocks) { consume_part(tile, blocks); });
  }

  __device__ void consume_part(TilePlace tile, BlockRange blocks) {
    float sums[columns / 2] = {};
    OnlineSoftmax softmax = begin_softmax(tile);

#pragma unroll 1
    for (int n = blocks.end - 1; n >= blocks.begin; --n) {
      if (next_.is_odd() == (group_ == 1)) {
        add_own(tile, n, softmax, sums);
      } else {
        add_others(tile, n, softmax, sums);
      }
      next_.advance();
    }

    add_weights_of_other(softmax);
    results_.write(work_of(tile), blocks.begin, sums, softmax, this->value_factor(tile));
  }

  /// Scores block n, and adds its weights and weighted values to the sums.
  __device__ void add_own(TilePlace tile, int n, OnlineSoftmax& softmax, Sums sums) {
    float scores[keys / 2];
    float rescale[rows_of_thread];
    unsigned weights[keys / 4];
    await(shared_.k, next_);
    if constexpr (variant.qv) await(shared_.v, next_);
    start_scores(scores, query_matrix(tile), key_matrix(),
                 ptx::matrix_at(ptx::shared_address(&shared_.v_tiles[next_.stage()])), this->scales_of(tile).qk_factor);
    ptx::wgmma_wait<0>();
    ptx::hold(scores);
    release_keys(tile, n);

    this->modify_scores(scores, tile);
    this->hide_keys(scores, work_of(tile), n * keys);
    const bool rescales = softmax.template update<keys>(scores, rescale);
    this->round_weights(scores, weights);
    store_weights(weights);
    store_references(softmax);
    __syncwarp();
    if (accumulator_column() == 0) shared_.weighed[group_].arrive();
    if (__any_sync(~0U, rescales)) scale_rows<columns>(sums, rescale);
    if constexpr (!variant.qv) await(shared_.v, next_);
    start_values(weights, sums, value_matrix(next_));
    finish_values(sums);
  }

  /// Adds the values of block n, weighted as the other consumer says.
  __device__ void add_others(TilePlace tile, int n, OnlineSoftmax& softmax, Sums sums) {
    await(shared_.k, next_);  // every consumer waits for every block: parity tells but the last two apart
    release_keys(tile, n);
    await(shared_.v, next_);
    // The other consumer's blocks are every other one. Its barrier's address is not worth a register all along.
    shared_.weighed[ptx::known_only_here(1 - group_)].wait(next_.template in<2>().parity());
    float rescale[rows_of_thread];
    bool rescales = false;
#pragma unroll
    for (int i = 0; i < rows_of_thread; ++i) {
      rescales |= softmax.follow(i, reference_of_other(i), rescale[i]);
    }
    if (__any_sync(~0U, rescales)) scale_rows<columns>(sums, rescale);
    const unsigned p = ptx::matrix_at(ptx::shared_address(&shared_.weights.tile));
    const unsigned v = value_matrix(next_);
    ptx::wgmma_fence();
#pragma unroll
    for (int step = 0; step < keys / 16; ++step) {
      const unsigned p_of_step = ptx::advance(p, step / 4 * variant.tile_rows() * chunk_row_bytes + step % 4 * 32);
      Consumer<variant>::for_columns([&]<int some, int first_column>() {
        ptx::wgmma<variant.element(), some, ptx::Major::mn, first_column / 2>(
            sums, p_of_step, Consumer<variant>::values_of_step(v, step, first_column), 1);
      });
    }
    ptx::wgmma_commit();
    finish_values(sums);
  }

  /// Waits until this block's values have been added.
  __device__ void finish_values(Sums sums) const {
    ptx::wgmma_wait<0>();
    ptx::hold(sums);
    release(shared_.v.empty[next_.stage()]);
  }

  /// Of block n, which this consumer has scored, or leaves to the other.
  __device__ void release_keys(TilePlace tile, int n) {
    release(shared_.k.empty[next_.stage()]);
    release_queries_at(tile, n);
  }

  /// Puts weights where the other consumer reads them. Those of the block before are in the way no more: only this
  /// consumer has read them.
  __device__ void store_weights(const unsigned (&weights)[keys / 4]) const {
    const unsigned lane = threadIdx.x % 32;
    const unsigned row = threadIdx.x % 128 / 32 * 16 + lane % 16;
    const unsigned tile = ptx::shared_address(&shared_.weights.tile);
#pragma unroll
    for (int j = 0; j < keys / 8; j += 2) {
      const unsigned words[4] = {weights[2 * j], weights[2 * j + 1], weights[2 * j + 2], weights[2 * j + 3]};
      ptx::store_matrices(tile + piece_offset<variant.tile_rows()>(row, j + lane / 16), words);
    }
    ptx::fence_proxy_async();
  }

  // The lanes that write and read references are those that arrive at `weighed`, each for itself.
  __device__ void store_references(const OnlineSoftmax& softmax) const {
    if (accumulator_column() > 0) return;
#pragma unroll
    for (int i = 0; i < rows_of_thread; ++i)
      shared_.references[group_ * 64 + accumulator_row(i)] = softmax.reference(i);
  }

  __device__ float reference_of_other(int i) const {
    float reference = 0;
    if (accumulator_column() == 0) reference = shared_.references[(1 - group_) * 64 + accumulator_row(i)];
    return __shfl_sync(~0U, reference, threadIdx.x % 32 & ~3U);
  }

  /// Adds up the weights that either consumer has made.
  __device__ void add_weights_of_other(OnlineSoftmax& softmax) const {
    float* const own = shared_.weight_sums + group_ * 64;
    const float* const others = shared_.weight_sums + (1 - group_) * 64;
    float sum_of_row[rows_of_thread];
#pragma unroll
    for (int i = 0; i < rows_of_thread; ++i) {
      sum_of_row[i] = softmax.sum(i);
      if (accumulator_column() == 0) own[accumulator_row(i)] = sum_of_row[i];
    }
    results_.await_others();
#pragma unroll
    for (int i = 0; i < rows_of_thread; ++i) softmax.set_sum(i, sum_of_row[i] + others[accumulator_row(i)]);
    results_.await_others();  // they have read them, before others take their place
  }
};

template <ForwardVariant variant>
__device__ __forceinline__ void wide(const ForwardArguments& a) {
  run<variant, WideConsumer<variant>>(a);
}

}  // namespace mate::cuda
