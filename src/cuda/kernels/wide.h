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
// |                            | (+ qv x the same keys' values, transposed)         | v.full     | k.empty   |
// |                            | makes weights of the scores, and puts them in      |            |           |
// |                            | shared memory, with what they are relative to      |            | the other |
// |                            | rescales its sums where a row's maximum has grown, |            |           |
// |                            | and sums += weights (in registers) x its columns   | v.full     | v.empty   |
// | of the other's block       | lets its keys go; rescales its sums likewise,      | k.full,    | k.empty   |
// |                            | and sums += the other's weights x its columns      | the other, | v.empty   |
// |                            |                                                    | v.full     |           |
// | after the last block       | both add up the row sums of each other,            | the other  | the other |
// |                            | and store their columns of out or of a part        |            |           |
//
// So scores are products of as many keys as a block has, whose operands shared memory delivers in time. The first
// consumer does its block and then the other's. With more than one stage the second one scores its own before it adds
// the first one's, so that these products run while weights are made. Were both to score ahead, all stages would be
// held until the next two blocks are there, and none would be on its way meanwhile.
//
// What limits it is how long shared memory is held, or waits for what is on its way. So a block's values come and go in
// two slices, the columns of either consumer, unless rows are gathered; and a slice is one order to the copy engine
// where a block lies in one page and heads are whole chunks.
//
// And so two blocks of threads may work on the same keys, a cluster (ForwardVariant::cluster_blocks): on rows of their
// own, as those of forward.h, or where keys are shared out, on units of heads of their own, which then need the same
// steps. Each fetches every other block of keys, and one slice of all values, into the shared memory of both.
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
  // Of the second consumer. Where rows are gathered and split there are no registers for it.
  static constexpr bool scores_before_others = variant.stages > 1 && !(variant.gather && variant.splits);
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
        add_own<false>(tile, n, softmax, sums);
      } else {
        await(shared_.k, next_);  // every consumer waits for every block: parity tells but the last two apart
        release_keys(tile, n);
        if (scores_before_others && group_ == 1 && n > blocks.begin) {
          next_.advance();
          --n;
          add_own<true>(tile, n, softmax, sums);
        } else {
          start_others(next_, softmax, sums);
          finish_values(next_, sums);
        }
      }
      next_.advance();
    }

    add_weights_of_other(softmax);
    results_.write(work_of(tile), blocks.begin, sums, softmax, this->value_factor(tile));
  }

  /// Scores block n, and adds its weights and weighted values to the sums; before these, where they are `after_others`,
  /// the values of the other consumer's block before it.
  template <bool after_others>
  __device__ void add_own(TilePlace tile, int n, OnlineSoftmax& softmax, Sums sums) {
    float scores[keys / 2];
    float rescale[rows_of_thread];
    unsigned weights[keys / 4];
    score(tile, scores);
    release_keys(tile, n);
    if constexpr (after_others) start_others(next_.before(1), softmax, sums);

    this->modify_scores(scores, tile);
    this->hide_keys(scores, work_of(tile), n * keys);
    const bool rescales = softmax.template update<keys>(scores, rescale);
    this->round_weights(scores, weights);
    if constexpr (after_others) {
      // The assembler moves the wait for products up to the last branch before it: that of a wait that is over already.
      await(values(), next_.before(1));
      finish_values(next_.before(1), sums);
    }
    store_weights(weights);
    store_references(softmax);
    __syncwarp();
    if (accumulator_column() == 0) shared_.weighed[group_].arrive();
    if (__any_sync(~0U, rescales)) scale_rows<columns>(sums, rescale);
    if constexpr (!variant.qv) await(values(), next_);
    start_values(weights, sums, value_matrix(next_));
    finish_values(next_, sums);
  }

  /// scores = queries x keys + queries of values x values, of the next block: each slice of it as soon as it is there.
  __device__ void score(TilePlace tile, float (&scores)[keys / 2]) const {
    const unsigned q = query_matrix(tile);
    await(shared_.k, next_);
    ptx::wgmma_fence();
    Consumer<variant>::template multiply<variant.head_dim>(scores, q, key_matrix(), 0);
    if constexpr (variant.qv) {
      const unsigned v = ptx::matrix_at(ptx::shared_address(&shared_.v_tiles[next_.stage()]));
      constexpr int columns_of_slice = variant.head_dim_v / variant.v_slices();
#pragma unroll
      for (int slice = 0; slice < variant.v_slices(); ++slice) {
        // The other's slice is awaited in every other block alone. Parity tells all the same: the block in between has
        // been scored, and so was there, before its weights came here.
        await(shared_.v[slice], next_);
        ptx::wgmma_fence();
        const int first_byte = slice * columns_of_slice / chunk_columns * chunk_row_bytes;  // of a row
        Consumer<variant>::template multiply<columns_of_slice>(
            scores, ptx::advance(q, variant.qv_offset() + first_byte * variant.tile_rows()),
            ptx::advance(v, first_byte * keys), 1);
      }
    }
    ptx::wgmma_commit();
    ptx::wgmma_wait<0>();
    ptx::hold(scores);
  }

  /// Starts to add the values of a block, weighted as the other consumer says.
  __device__ void start_others(RingPlace<variant.stages> block, OnlineSoftmax& softmax, Sums sums) {
    await(values(), block);
    // The other consumer's blocks are every other one. Its barrier's address is not worth a register all along.
    shared_.weighed[ptx::known_only_here(1 - group_)].wait(block.template in<2>().parity());
    float rescale[rows_of_thread];
    bool rescales = false;
#pragma unroll
    for (int i = 0; i < rows_of_thread; ++i) {
      rescales |= softmax.follow(i, reference_of_other(i), rescale[i]);
    }
    if (__any_sync(~0U, rescales)) scale_rows<columns>(sums, rescale);
    const unsigned p = ptx::matrix_at(ptx::shared_address(&shared_.weights.tiles));
    const unsigned v = value_matrix(block);
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
  }

  /// Waits until a block's values have been added.
  __device__ void finish_values(RingPlace<variant.stages> block, Sums sums) const {
    ptx::wgmma_wait<0>();
    ptx::hold(sums);
    release_for<variant.cluster_blocks>(values().empty[block.stage()]);
  }

  /// The ring of this consumer's columns of values.
  __device__ RingBarriers<variant.stages>& values() const { return shared_.v[variant.v_slices() > 1 ? group_ : 0]; }

  /// Of block n, which this consumer has scored, or leaves to the other.
  __device__ void release_keys(TilePlace tile, int n) {
    release_for<variant.cluster_blocks>(shared_.k.empty[next_.stage()]);
    release_queries_at(tile, n);
  }

  /// Puts weights where the other consumer reads them. Those of the block before are in the way no more: only this
  /// consumer has read them.
  __device__ void store_weights(const unsigned (&weights)[keys / 4]) const {
    const unsigned lane = threadIdx.x % 32;
    const unsigned row = threadIdx.x % 128 / 32 * 16 + lane % 16;
    const unsigned tile = ptx::shared_address(&shared_.weights.tiles);
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
