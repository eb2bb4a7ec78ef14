// Attention of many query rows, and of few that are too many for stream.h, or whose scores of e4m3 may be too large
// (has_large_scores in choices.cpp).
//
// A block of threads stays on its multiprocessor and takes tiles of query rows until there are none left, or, where
// keys are shared out, the pieces of its share. One warpgroup schedules and loads; the others, each with 64 rows of the
// tile, multiply:
//
// | who                        | does                                               | waits for  | tells     |
// | -------------------------- | -------------------------------------------------- | ---------- | --------- |
// | warp 0: scheduler          | takes a tile about when the one before is begun,   | work.empty | work.full |
// |                            | and finds its sequence and keys                    | begun      |           |
// | warp 1: loader             | fetches a block of keys, the last block first      | k.empty    | k.full    |
// |                            | fetches the tile's queries                         | q.empty    | q.full    |
// | warp 2: loader             | fetches a block of values                          | v.empty    | v.full    |
// | (where rows are gathered, all warps of producers do both)                       |            |           |
// | preparers, of e4m3         | widen or transpose what loaders have fetched: see  | *.empty    | *.full    |
// |                            | preparer.h                                         |            |           |
// | each consumer, in turns    | starts scores = queries x keys of the next block   | k.full     |           |
// |                            | and sums += weights x values of this one           | v.full     |           |
// | then on its own            | makes weights of the scores while the values' run  |            | k.empty   |
// |                            | rescales the sums where a row's maximum has grown  |            | v.empty   |
// |                            | after the last block stores sums and log-sum-exp,  |            | q.empty   |
// |                            | or a part of them, and merges parts if it is last  |            |           |
//
// So the matrix units work while weights are made: a consumer starts both products only when the one before it has
// started its own, so that they stay a step apart (ping-pong), and one makes weights while another multiplies.
// Registers move from the producers to the consumers (setmaxnreg): a consumer holds its 64 rows of scores, weights and
// sums in them.
//
// Two blocks of threads may have a tile together, a cluster (ForwardVariant::cluster_blocks), each half of its rows.
// Either fetches half of each block of keys, and of values, into the shared memory of both, so that the L2 cache is
// read half as often. k.empty and v.empty then wait for the consumers of both, who release buffers in both, and so do
// preparers for fetched_v.empty where v.empty is of what they have prepared (preparer.h). The scheduler of the first
// takes tiles and tells the other which.
//
// Or, where tiles are few and keys many, each tile is that of a cluster of up to eight blocks of threads, which share
// out its keys (ForwardVariant::merges_in_cluster). Each leaves its sums in its shared memory, where keys and values
// were, and when all have, each merges some of the rows (split-KV, merged through distributed shared memory).
#pragma once

#include "carried_sums.h"
#include "consumer.h"

namespace mate::cuda {

template <ForwardVariant variant>
class ForwardConsumer : Consumer<variant> {
 public:
  static constexpr int keys = variant.block_keys;

  using Consumer<variant>::Consumer;

  __device__ void run() {
    if (variant.warpgroups > 1 && group_ == variant.warpgroups - 1) pass_turn();
    TilePlace tile;
    for (bool found = find_tile(tile); found;) {
      if (!variant.splits || !is_idle(tile)) {
        found = consume(tile);
      } else {
        skip(tile);
        tile.advance();
        found = find_tile(tile);
      }
    }
  }

 private:
  using typename Consumer<variant>::ScoreTile;
  using typename Consumer<variant>::Sums;
  using typename Consumer<variant>::TilePlace;
  using Consumer<variant>::a_;
  using Consumer<variant>::await;
  using Consumer<variant>::await_queries;
  using Consumer<variant>::begin_of_part;
  using Consumer<variant>::begin_softmax;
  using Consumer<variant>::find_tile;
  using Consumer<variant>::group_;
  using Consumer<variant>::key_matrix;
  using Consumer<variant>::next_;
  using Consumer<variant>::query_matrix;
  using Consumer<variant>::release_queries_at;
  using Consumer<variant>::release_tile;
  using Consumer<variant>::replaces_sums;
  using Consumer<variant>::results_;
  using Consumer<variant>::shared_;
  using Consumer<variant>::start_scores;
  using Consumer<variant>::start_values;
  using Consumer<variant>::value_matrix;
  using Consumer<variant>::weight_words;
  using Consumer<variant>::work_of;

  /// From this tile on, until one is found that is nothing to this consumer. Returns whether there is one, in `tile`.
  ///
  /// The blocks of all tiles are one sequence: while the values of a tile's last block are multiplied, weights are made
  /// of the first block of the next.
  __device__ bool consume(TilePlace& tile) {
    int n = work_of(tile).blocks.end - 1;
    float sums[variant.head_dim_v / 2] = {};
    bool any_sums = false;
    float scores[keys / 2];
    unsigned weights[weight_words];
    float rescale[rows_of_thread];
    OnlineSoftmax softmax = begin_softmax(tile);
    CarriedSums<variant> carried(a_, shared_, group_);
    carried.begin(n);

    await_queries(tile);
    await_keys();
    const bool in_turn = begin_turn();
    start_scores(scores, query_matrix(tile), key_matrix());
    if (in_turn) pass_turn();
    ptx::wgmma_wait<0>();
    ptx::hold(scores);
    release_keys();
    release_queries_at(tile, n);
    this->modify_scores(scores, tile);
    this->hide_keys(scores, work_of(tile), n * keys);
    softmax.template update<keys>(scores, rescale);
    this->round_weights(scores, weights);

    for (;;) {
      // Steps to blocks of the same tile that need no mask, until sums are to be set aside.
      const BlockRange whole = work_of(tile).whole;
      const int part_begin = begin_of_part(tile, n);
      const int whole_begin = max(max(whole.begin, part_begin), carried.next());
      if (n > whole_begin && n <= whole.end) {
        await_keys();
        await_values();
        do {
          --n;
          start_products(tile, scores, weights, sums, any_sums);
          release_keys();
          release_queries_at(tile, n);
          this->modify_scores(scores, tile);
          const bool rescales = softmax.template update<keys>(scores, rescale);
          ptx::hold(scores);
          await_keys();
          finish_values(sums);
          await_values();
          this->round_weights(scores, weights);
          if (__any_sync(~0U, rescales)) scale_rows<variant.head_dim_v>(sums, rescale);
        } while (n > whole_begin);
      }
      // A step to any block, perhaps the first of the next part or tile.
      const bool ends_part = n == part_begin;
      const bool last = variant.splits ? n == work_of(tile).blocks.begin : ends_part;
      bool more = true;    // there is a block for this consumer
      bool skips = false;  // there is none of it in the next tile
      TilePlace next = tile;
      if (last) {
        next.advance();
        more = find_tile(next);
        if constexpr (variant.splits) {
          skips = more && is_idle(next);
          more = more && !skips;
        }
      }
      const OnlineSoftmax finished = softmax;
      bool rescales = false;
      if (more) {
        if (last) {
          n = work_of(next).blocks.end;
          await_queries(next);
        }
        if (ends_part) softmax = begin_softmax(next);
        --n;
        await_keys();
        await_values();
        start_products(next, scores, weights, sums, any_sums);
        release_keys();
        release_queries_at(next, n);
        this->modify_scores(scores, next);
        this->hide_keys(scores, work_of(next), n * keys);
        rescales = softmax.template update<keys>(scores, rescale);
        ptx::hold(scores);
        await_values_in_use();
        finish_values(sums);
        this->round_weights(scores, weights);
      } else {
        await_values();
        start_values(weights, sums, value_matrix(next_.before(1)), any_sums);
        ptx::wgmma_wait<0>();
        ptx::hold(sums);
        if (skips) release_values(next_.before(1));
      }
      if (ends_part) {
        carried.add_to(sums, finished);
        carried.begin(n);
        results_.write(work_of(tile), part_begin, sums, finished, this->value_factor(tile));
        if (last) {
          release_tile(tile);
          tile = next;
          if (!more) return skips;
        }
        forget_sums(sums, any_sums);
      } else {
        if (__any_sync(~0U, rescales)) scale_rows<variant.head_dim_v>(sums, rescale);
        if (carried.is_due(n)) carried.carry(sums, softmax, n);
      }
    }
  }

  /// Whether a tile has no rows for this consumer: decoding, in a batch that is not all decoding.
  __device__ bool is_idle(TilePlace tile) const {
    if (variant.warpgroups == 1 || group_ == 0) return false;
    return place_of(a_, work_of(tile), group_ * 64).query >= work_of(tile).place.query_capacity;
  }

  /// Lets the others have the blocks of a tile. It keeps in turn with them, or it would release buffers before their
  /// time.
  __device__ void skip(TilePlace tile) {
    const BlockRange blocks = work_of(tile).blocks;
#pragma unroll 1
    for (int n = blocks.end - 1; n >= blocks.begin; --n) {
      if (begin_turn()) pass_turn();
      release_keys();
      release_queries_at(tile, n);
      release_values(next_.before(1));
    }
    release_tile(tile);
  }

  /// Before the first values of another part are added.
  __device__ static void forget_sums(Sums sums, bool& any_sums) {
    any_sums = false;
    if constexpr (replaces_sums) return;
#pragma unroll
    for (int i = 0; i < variant.head_dim_v / 2; ++i) sums[i] = 0;
  }

  /// Starts the scores of the next block, of `tile`, and the values of this one, which are there, and waits for the
  /// scores.
  __device__ void start_products(TilePlace tile, ScoreTile scores, const unsigned (&weights)[weight_words], Sums sums,
                                 bool& any_sums) {
    const unsigned q = query_matrix(tile);
    const unsigned k = key_matrix();
    const unsigned v = value_matrix(next_.before(1));
    if constexpr (variant.warpgroups > 1) await_turn();
    start_scores(scores, q, k);
    start_values(weights, sums, v, any_sums);
    any_sums = true;
    if constexpr (variant.warpgroups > 1) pass_turn();
    ptx::wgmma_wait<1>();
    ptx::hold(scores);
  }

  /// Waits for the product with the values. The assembler moves this wait up to the last branch before it, so that one
  /// has to stand between it and the weights made before it: that of a wait for a barrier, be it over already.
  __device__ void finish_values(Sums sums) {
    ptx::wgmma_wait<0>();
    ptx::hold(sums);
    release_values(next_.before(2));
  }

  /// Waits for this consumer's turn. The first block of all is everybody's at once: then there is none, and false.
  __device__ bool begin_turn() {
    if constexpr (variant.warpgroups == 1 || !variant.splits) return false;
    const bool in_turn = !next_.is_first();
    if (in_turn) await_turn();
    return in_turn;
  }
  __device__ void await_turn() const { ptx::barrier_sync(first_turn_barrier + group_, 256); }
  __device__ void pass_turn() const {
    ptx::barrier_arrive(first_turn_barrier + (group_ + 1) % variant.warpgroups, 256);
  }

  // next_ is of the keys that come next; the values come a block behind.
  __device__ void await_keys() const { await(shared_.k, next_); }
  __device__ void await_values() const { await(shared_.v[0], next_.before(1)); }
  /// Those that are multiplied now, so that this is over already.
  __device__ void await_values_in_use() const {
    shared_.v[0].full[next_.before(2).stage()].wait(next_.before(2).parity());
  }

  __device__ void release_values(RingPlace<variant.stages> place) {
    release_for<variant.cluster_of_values()>(shared_.v[0].empty[place.stage()]);
  }

  __device__ void release_keys() {
    release_for<variant.cluster_blocks>(shared_.k.empty[next_.stage()]);
    next_.advance();
  }
};

template <ForwardVariant variant>
__device__ __forceinline__ void forward(const ForwardArguments& a) {
  run<variant, ForwardConsumer<variant>>(a);
}

}  // namespace mate::cuda
