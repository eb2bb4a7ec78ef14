// What the consumers of forward kernels have in common, and the rest of such a kernel: forward.h, wide.h, stream.h and
// transposed.h have the consumers themselves.
#pragma once

#include "forward_loader.h"
#include "preparer.h"
#include "ptx/launch.h"
#include "ptx/wgmma.h"
#include "results.h"
#include "schedule.h"
#include "split_scheduler.h"
#include "tile_scheduler.h"

namespace mate::cuda {

/// A warpgroup that consumes what is loaded, tile by tile.
template <ForwardVariant variant>
class Consumer {
 public:
  __device__ Consumer(const ForwardArguments& arguments, ForwardShared<variant>& shared, int group)
      : a_(arguments), shared_(shared), group_(group), results_(arguments, group, shared) {}

 protected:
  using TilePlace = RingPlace<ForwardShared<variant>::work_stages>;
  using ScoreTile = float (&)[variant.block_keys / 2];
  using Sums = float (&)[variant.consumer_columns() / 2];
  /// Of a thread's weights of a block.
  static constexpr int weight_words = variant.block_keys / 2 * bytes_of(variant.element()) / 4;

  /// The first of its rows in the tile.
  __device__ int first_row() const { return variant.wide ? 0 : group_ * 64; }

  __device__ const TileWork& work_of(TilePlace tile) const { return shared_.works[tile.stage()]; }

  __device__ const TileScales& scales_of(TilePlace tile) const {
    return shared_.scales[variant.scaled() ? tile.stage() : 0];
  }
  /// What a tile's sums of values are to be multiplied by.
  __device__ float value_factor(TilePlace tile) const { return variant.scaled() ? scales_of(tile).value_factor : 1; }

  /// Waits for a tile. False where there are no more.
  __device__ bool find_tile(TilePlace tile) {
    shared_.work.full[tile.stage()].wait(tile.parity());
    const TileWork& work = work_of(tile);
    if (work.sequence < 0) return false;
    if (!variant.splits && group_ == 0 && threadIdx.x % 128 == 0) {
      shared_.begun[tile.template in<2>().stage()].arrive();
    }
    if constexpr (!variant.keys_are_rows()) find_visible(work);
    return true;
  }

  /// Each lane for itself, since each reads what the scheduler says of the tile.
  __device__ void release_tile(TilePlace tile) { shared_.work.empty[tile.stage()].arrive(); }

  /// What the rows of this warp see, if some of it is to be hidden: found while registers are few, by a lane for each.
  __device__ void find_visible(const TileWork& work) {
    // It is not worth registers all along.
    const int lane = ptx::known_only_here(threadIdx.x % 32);
    __syncwarp();  // all lanes have read what the tile before left here
    const bool hides_first = work.whole.begin > work.blocks.begin;
    const bool hides_last = work.whole.end < work.blocks.end;
    if (lane < 16 && (hides_first || hides_last)) {
      const int row = accumulator_row_of_warp(lane);
      const int query = min(place_of(a_, work, first_row() + row).query, work.used - 1);
      KeyRange& visible = shared_.visible[group_ * 64 + row];
      if (hides_first) visible.begin = first_visible(a_.problem.mask, work.place.lengths, query);
      if (hides_last) visible.end = end_visible(a_.problem.mask, work.place.lengths, query);
    }
    __syncwarp();
  }

  /// The first block of the part of a tile that block n belongs to.
  __device__ int begin_of_part(TilePlace tile, int n) const {
    if constexpr (!variant.splits) return work_of(tile).blocks.begin;
    return work_of(tile).begin_of_part(a_.cut, n);
  }

  /// Calls consume_part(blocks) for each part of a tile, the last one first.
  template <typename ConsumePart>
  __device__ void for_each_part(TilePlace tile, const ConsumePart& consume_part) {
    const BlockRange blocks = work_of(tile).blocks;
#pragma unroll 1
    for (int end = blocks.end; end > blocks.begin;) {
      const int begin = begin_of_part(tile, end - 1);
      consume_part(BlockRange{begin, end});
      end = begin;
    }
  }

  /// Tiles are as many as their queries.
  using QueryPlace = RingPlace<variant.q_stages>;
  __device__ static QueryPlace queries_of(TilePlace tile) { return tile.template in<variant.q_stages>(); }

  __device__ unsigned query_matrix(TilePlace tile) const {
    const unsigned char* const rows = shared_.q_tiles[queries_of(tile).stage()].rows;
    return ptx::matrix_at(ptx::shared_address(rows) + first_row() * chunk_row_bytes);
  }
  __device__ unsigned key_matrix() const {
    return ptx::matrix_at(ptx::shared_address(&shared_.k_tiles[next_.stage()]));
  }
  /// This consumer's columns of a block of values.
  __device__ unsigned value_matrix(RingPlace<variant.stages> place) const {
    constexpr int chunk_bytes = variant.block_keys * chunk_row_bytes;
    const int first_chunk = variant.wide ? group_ * chunks_of(variant.consumer_columns()) : 0;
    return ptx::matrix_at(ptx::shared_address(&shared_.v_tiles[place.stage()]) + first_chunk * chunk_bytes,
                          chunk_bytes);
  }

  // An instruction multiplies what 32 bytes of the sum's elements hold.
  static constexpr int step_bytes = 32;
  __device__ static constexpr int steps_of(int elements) { return elements * bytes_of(variant.element()) / step_bytes; }
  /// Where a step begins in a matrix of `rows` rows along the sum.
  template <int rows>
  __device__ static constexpr int bytes_of_step(int step) {
    constexpr int steps_of_chunk = chunk_row_bytes / step_bytes;
    return step / steps_of_chunk * rows * chunk_row_bytes + step % steps_of_chunk * step_bytes;
  }

  /// scores + queries x keys, of `columns` columns; or scores = queries x keys, where they do not `accumulate` yet.
  template <int columns>
  __device__ static void multiply(ScoreTile scores, unsigned q, unsigned k, int accumulate) {
#pragma unroll
    for (int step = 0; step < steps_of(columns); ++step) {
      ptx::wgmma<variant.element(), variant.block_keys>(
          scores, ptx::advance(q, bytes_of_step<variant.tile_rows()>(step)),
          ptx::advance(k, bytes_of_step<variant.block_keys>(step)), accumulate | (step > 0));
    }
  }

  /// Starts scores = queries x keys.
  __device__ static void start_scores(ScoreTile scores, unsigned q, unsigned k) {
    ptx::wgmma_fence();
    multiply<variant.head_dim>(scores, q, k, 0);
    ptx::wgmma_commit();
  }

  /// Whether the first values of a part replace the sums. Else these are 0 then: registers are too few to tell when.
  static constexpr bool replaces_sums = variant.scores_ahead() && !variant.splits && !variant.e4m3;

  /// Starts sums += weights x values; or, where they are not `any_sums` yet, sums = weights x values.
  __device__ static void start_values(const unsigned (&weights)[weight_words], Sums sums, unsigned v,
                                      [[maybe_unused]] bool any_sums = true) {
    ptx::wgmma_fence();
#pragma unroll
    for (int step = 0; step < steps_of(variant.block_keys); ++step) {
      for_columns([&]<int columns, int first_column>() {
        const unsigned* const a = weights + 4 * step;
        const unsigned b = values_of_step(v, step, first_column);
        if constexpr (replaces_sums) {
          if (step == 0) {
            ptx::wgmma<variant.element(), columns, first_column / 2, true>(sums, a, b, any_sums);
            return;
          }
        }
        ptx::wgmma<variant.element(), columns, first_column / 2>(sums, a, b);
      });
    }
    ptx::wgmma_commit();
  }

  /// Calls product<columns, first_column>() for columns that one instruction multiplies: all that a consumer has,
  /// unless so many threads share the registers that the assembler has too few for an instruction of all.
  template <typename Product>
  __device__ static void for_columns(const Product& product) {
    constexpr int all = variant.consumer_columns();
    constexpr int some = variant.registers_at_start() < all / 2 + 32 ? 2 * chunk_columns : all;
    static_assert(some <= 256 && all - some <= 256, "an instruction has no more");
    product.template operator()<some, 0>();
    if constexpr (some < all) product.template operator()<all - some, some>();
  }

  /// The keys of a step in a block of values, from a column on that begins a chunk.
  __device__ static unsigned values_of_step(unsigned v, int step, int first_column) {
    if constexpr (variant.e4m3) {
      return ptx::advance(v, first_column * chunk_row_bytes + bytes_of_step<variant.head_dim_v>(step));
    }
    return ptx::advance(v, (first_column / chunk_columns * variant.block_keys + step * 16) * chunk_row_bytes);
  }

  /// What the call does to a product of a query and a key before it is compared with others.
  template <int count>
  __device__ void modify_scores(float (&scores)[count], TilePlace tile) const {
    const float factor = variant.scaled() ? scales_of(tile).score_factor : a_.score_factor;
    if constexpr (variant.scores == Scores::capped) {
#pragma unroll
      for (int i = 0; i < count; ++i) scores[i] = tanh_accurately(scores[i] * factor);
    } else if (variant.scores == Scores::scaled || (variant.scaled() && factor != 1)) {
#pragma unroll
      for (int i = 0; i < count; ++i) scores[i] *= factor;
    }
  }

  template <typename Softmax = OnlineSoftmax>
  __device__ Softmax begin_softmax(TilePlace tile) const {
    // Weights of e4m3 are up to 2**8, so that it has more of the small ones.
    constexpr float largest_exponent = variant.element() == ElementType::float8_e4m3 ? 8 : 0;
    return Softmax(variant.scaled() ? scales_of(tile).exponent_scale : a_.exponent_scale, largest_exponent);
  }

  /// Hides from each row of scores the keys, from `first_key` on, that it does not see.
  template <int count>
  __device__ void hide_keys(float (&scores)[count], const TileWork& work, int first_key) const {
    constexpr int keys = count * 2;
    const KeyRange* const visible = shared_.visible + group_ * 64 + accumulator_row(0);
    if (first_key + keys > work.seen_by_all.end) {
      hide_keys_from<keys>(scores, visible[0].end - first_key, visible[8].end - first_key);
    }
    if (first_key < work.seen_by_all.begin) {
      hide_keys_before<keys>(scores, visible[0].begin - first_key, visible[8].begin - first_key);
    }
  }

  /// An accumulator's columns are already where the product with the values takes its first operand; of e4m3, if those
  /// of every 16 keys are taken in the order in which transposed values lie: see Transposition.
  template <int count, int words>
  __device__ static void round_weights(const float (&scores)[count], unsigned (&weights)[words]) {
    if constexpr (variant.element() == ElementType::float8_e4m3) {
#pragma unroll
      for (int i = 0; i < words; ++i) {
        const int first = i / 2 * 8 + i % 2 * 2;
        weights[i] = pack_e4m3(scores[first], scores[first + 1], scores[first + 4], scores[first + 5]);
      }
    } else {
#pragma unroll
      for (int i = 0; i < words; ++i) weights[i] = pack<variant.element()>(scores[2 * i], scores[2 * i + 1]);
    }
  }

  template <int stages>
  __device__ static void await(RingBarriers<stages>& ring, RingPlace<stages> place) {
    ring.full[place.stage()].wait(place.parity());
    // The copy engine writes where products read; threads that copy do not.
    if constexpr (variant.gather && !variant.keys_are_rows()) ptx::fence_proxy_async();
  }
  __device__ void await_queries(TilePlace tile) const { await(shared_.q, queries_of(tile)); }

  /// After the scores of block n of a tile: its queries are needed no more after the first block, which comes last.
  __device__ void release_queries_at(TilePlace tile, int n) {
    if (n > work_of(tile).blocks.begin) return;
    release(shared_.q.empty[queries_of(tile).stage()]);
  }

  const ForwardArguments& a_;
  ForwardShared<variant>& shared_;
  int group_;
  ResultWriter<variant> results_;
  RingPlace<variant.stages> next_;  ///< of the block that comes next
};

/// The arguments as the variant knows them.
template <ForwardVariant variant>
__device__ __forceinline__ decltype(auto) known_arguments(const ForwardArguments& given) {
  if constexpr (variant.plain) {
    return plain_arguments(given);
  } else {
    return (given);
  }
}

/// A forward kernel: its block of threads divided among those who schedule, load, and consume, all in one way, or the
/// last ones in another. No call: products that run on must not cross one.
template <ForwardVariant variant, typename ConsumerOfVariant, typename OtherConsumer = ConsumerOfVariant>
__device__ __forceinline__ void run(const ForwardArguments& given) {
  const auto& a = known_arguments<variant>(given);
  static_assert(sizeof(ForwardShared<variant>) <= variant.shared_bytes());
  extern __shared__ unsigned char memory[];
  auto& shared = *reinterpret_cast<ForwardShared<variant>*>(memory);
  if (threadIdx.x == 0) {
    if constexpr (!variant.gather) {
      for (const TensorMap* map : {&given.maps.k, &given.maps.v}) ptx::prefetch(*map);
      if constexpr (!variant.widens_queries()) {
        ptx::prefetch(given.maps.q);
        if constexpr (variant.qv) ptx::prefetch(given.maps.qv);
      }
    }
    shared.init();
  }
  let_next_begin_at_once(a);
  if constexpr (variant.cluster_blocks > 1) {
    ptx::cluster_sync();
  } else {
    __syncthreads();
  }
  if constexpr (variant.splits) {
    if (counts_together(a.problem)) {  // once lengths are what they will be: nothing of them is kept
      await_inputs(a);
      count_together<variant>(a, shared.batch_steps());
      __syncthreads();
    }
  }
  const int consumer = static_cast<int>(threadIdx.x / 128) - variant.producer_warpgroups();
  if (consumer < 0) {
    const int warp = static_cast<int>(threadIdx.x / 32);
    if (variant.prepares() && variant.producer_warpgroups() > 1 && warp >= 4) {
      // A branch of its own, so that the assembler knows how many registers each role has.
      ptx::set_registers<variant.other_producer_registers(), variant.registers_at_start()>();
      await_inputs(a);
      if constexpr (variant.prepares()) Preparer<variant>(a, shared).run();
    } else {
      if constexpr (variant.moves_registers())
        ptx::set_registers<variant.producer_registers(), variant.registers_at_start()>();
      if (warp == 0) {
        if constexpr (variant.splits) {
          schedule(a, shared, SplitScheduler<variant>(a));
        } else {
          schedule(a, shared, TileScheduler<variant>(a, shared));
        }
      } else {
        await_inputs(a);
        if (threadIdx.x == 96) shared.readable.arrive();
        if (warp <= variant.loader_warps()) {
          ForwardLoader<variant>(given.maps, a, shared).run();
        } else if constexpr (variant.prepares() && variant.producer_warpgroups() == 1) {
          Preparer<variant>(a, shared).run();
        }
      }
    }
    if constexpr (variant.merges_in_cluster) ptx::cluster_sync();  // consumers wait for all threads
  } else if (variant.transposed() && consumer < variant.scorers()) {
    if constexpr (variant.transposed()) {
      ptx::set_registers<variant.scorer_registers(), variant.registers_at_start()>();
      await_inputs(a);
      ConsumerOfVariant(a, shared, consumer).run();
    }
  } else {
    if constexpr (variant.moves_registers())
      ptx::set_registers<variant.consumer_registers(), variant.registers_at_start()>();
    await_inputs(a);
    OtherConsumer(a, shared, consumer).run();
    if constexpr (variant.merges_in_cluster) {
      ptx::cluster_sync();  // all blocks have stored their parts of the tile
      const float value_factor = variant.scaled() ? shared.scales[0].value_factor : 1;
      ResultWriter<variant>(a, consumer, shared).merge_in_cluster(shared.works[0], value_factor);
    }
  }
  if (threadIdx.x < 32) clear_rows_of_no_tile<variant>(a);  // the scheduler, which is done first
  await_prefills(a);
  if constexpr (variant.clustered()) ptx::cluster_sync();  // others may yet reach into this block's shared memory
}

}  // namespace mate::cuda
