// Attention: one kernel for prefill and decoding.
//
// A block of threads stays on its multiprocessor and takes tiles of query rows until there are none left, or, where
// keys are shared out, the pieces of its share. One warpgroup schedules and loads; the others, each with 64 rows of the
// tile, multiply:
//
// | who                        | does                                               | waits for  | tells     |
// | -------------------------- | -------------------------------------------------- | ---------- | --------- |
// | warp 0: scheduler          | takes a tile when the one before is begun, and     | work.empty | work.full |
// |                            | finds its sequence and keys                        | begun      |           |
// | warp 1: loader, one lane   | fetches a block of keys, the last block first      | k.empty    | k.full    |
// | issuing copies (warps 1 to | fetches the tile's queries                         | q.empty    | q.full    |
// | 3, all lanes, where rows   | fetches a block of values                          | v.empty    | v.full    |
// | are gathered)              |                                                    |            |           |
// | each consumer, in turns    | starts scores = queries x keys of the next block   | k.full     |           |
// |                            | and sums += weights x values of this one           | v.full     |           |
// | then on its own            | makes weights of the scores while the values' run  |            | k.empty   |
// |                            | rescales the sums where a row's maximum has grown  |            | v.empty   |
// |                            | after the last block stores sums and log-sum-exp,  |            | q.empty   |
// |                            | or a part of them, and merges parts if it is last  |            |           |
//
// So the matrix units work while weights are made: a consumer starts both products only when the one before it has
// started its own, so that they stay a step apart, and one makes weights while another multiplies. Registers move from
// the producers to the consumers (setmaxnreg): a consumer holds its 64 rows of scores, weights and sums in them.
#pragma once

#include "load.h"
#include "merge.h"
#include "ptx/global.h"
#include "ptx/launch.h"
#include "ptx/wgmma.h"
#include "softmax.h"
#include "split_scheduler.h"
#include "store.h"
#include "tile_scheduler.h"

namespace mate::cuda {

/// The barriers of a ring of buffers that a producer fills and consumers empty.
template <int stages>
struct RingBarriers {
  ptx::Mbarrier full[stages], empty[stages];

  __device__ void init(int producers, int consumers) {
    for (int i = 0; i < stages; ++i) {
      full[i].init(producers);
      empty[i].init(consumers);
    }
  }
};

/// A place in a ring, and the parity of the round. The producer waits for the other parity: all is empty at first.
template <int stages>
class RingPlace {
 public:
  __device__ int stage() const { return static_cast<int>(count_ % stages); }
  __device__ unsigned parity() const { return count_ / stages % 2; }
  __device__ bool is_odd() const { return count_ % 2 != 0; }
  __device__ void advance() { ++count_; }
  __device__ RingPlace before(int count) const { return RingPlace(count_ - count); }

  RingPlace() = default;

 private:
  __device__ explicit RingPlace(unsigned count) : count_(count) {}

  unsigned count_ = 0;
};

template <int bytes>
struct alignas(1024) TileBuffer {
  unsigned char rows[bytes];
};

template <ForwardVariant variant>
struct ForwardShared {
  static constexpr int work_stages = 4;
  static constexpr int loader_warps = variant.gather ? 3 : 1;

  TileBuffer<variant.q_bytes()> q_tiles[variant.q_stages];
  TileBuffer<variant.k_bytes()> k_tiles[variant.stages];
  TileBuffer<variant.v_bytes()> v_tiles[variant.stages];
  TileWork works[work_stages];
  KeyRange visible[variant.tile_rows()];  ///< to each row of the consumers' tiles, where some of their keys are hidden
  int merges[variant.warpgroups];         ///< whether the parts of a consumer's rows are all done
  RingBarriers<variant.q_stages> q;
  RingBarriers<variant.stages> k, v;
  RingBarriers<work_stages> work;
  ptx::Mbarrier begun;      ///< a tile: the next may be taken
  ptx::Mbarrier v_fetched;  ///< of a block of values that the loader changes before consumers may have it

  __device__ void init() {
    constexpr int producers = variant.gather ? loader_warps * 32 : 1;
    constexpr int consumer_warps = 4 * variant.warpgroups;
    q.init(producers, consumer_warps);
    k.init(producers, consumer_warps);
    v.init(producers, consumer_warps);
    work.init(1, 32 * (loader_warps + consumer_warps));
    begun.init(1);
    v_fetched.init(1);
    ptx::fence_mbarrier_init();
  }
};

/// A warp writes a row of out that is 0, and its log-sum-exp.
__device__ inline void clear_row(const Problem& p, int slot, long long row, int head, float lse) {
  const int lane = threadIdx.x % 32;
  auto* const elements = static_cast<unsigned short*>(p.out.at(slot, row, head));
#pragma unroll 1
  for (int column = lane; column < p.head_dim_v; column += 32) elements[column] = 0;
  if (p.lse.data != nullptr && lane == 0) p.lse.at(slot, head, row) = lse;
}

__device__ inline bool first_lane() { return threadIdx.x % 32 == 0; }

/// Each warp that has done with a buffer says so.
__device__ inline void release(ptx::Mbarrier& empty) {
  if (first_lane()) empty.arrive();
}

/// Which query a row of a tile belongs to, and which head.
struct RowPlace {
  int query;  ///< beyond all others, where the tile ends before
  int head;
};
__device__ inline RowPlace place_of(const ForwardArguments& a, const TileWork& work, int row) {
  const int packed = work.first_head + row;
  // Rounded down that is packed / pack: half a row is far more than what is lost in rounding.
  const int query = static_cast<int>((packed + 0.5F) * a.heads_reciprocal);
  return {row < a.tile_rows ? work.first_query + query : max_length, work.unit * a.pack + packed - query * a.pack};
}

/// The sink of a query head, -inf where there is none.
__device__ inline float sink_of(const Problem& p, int head) {
  return p.sink.given() ? widen(p.sink.at(head), p.sink.type) : -infinity();
}

/// A warp clears a tile whose rows see no keys, or are not to be computed.
template <ForwardVariant variant>
__device__ void clear_tile(const ForwardArguments& a, const TileWork& work) {
  const Problem& p = a.problem;
#pragma unroll 1
  for (int row = 0; row < a.tile_rows; ++row) {
    ptx::forget_shared_memory();
    const RowPlace place = place_of(a, work, row);
    if (place.query >= work.capacity) return;
    clear_row(p, p.query_slot(work.sequence), static_cast<long long>(work.place.first_q) + place.query, place.head,
              place.query < work.used ? sink_of(p, place.head) : -infinity());
  }
}

template <ForwardVariant variant, typename Scheduler>
__device__ void schedule(const ForwardArguments& a, ForwardShared<variant>& shared) {
  // A share is found twice, first while earlier kernels run to their end, from lengths that they may yet change: then
  // the code and the arguments are in the caches when it counts.
  bool rehearses = variant.splits && ptx::known_only_here(1) != 0;
  if constexpr (!variant.splits) ptx::await_earlier_kernels();
  for (;;) {
    Scheduler scheduler(a);
    for (RingPlace<ForwardShared<variant>::work_stages> place;; place.advance()) {
      if constexpr (!variant.splits) {
        // Not more than one tile is taken ahead of its turn: others may have nothing to do by then.
        shared.begun.wait(!place.is_odd());
      }
      shared.work.empty[place.stage()].wait(place.parity() ^ 1);
      TileWork& work = shared.works[place.stage()];
      bool found = false;
      for (;;) {
        found = scheduler.next(work);
        __syncwarp();
        if (rehearses || !found || work.blocks.size() > 0) break;
        // Consumers hold on to a tile until they find the next, so those without keys must not be in their way.
        clear_tile<variant>(a, work);
        __syncwarp();
      }
      if (rehearses) break;
      if (first_lane()) shared.work.full[place.stage()].arrive();
      if (!found) return;
    }
    ptx::await_earlier_kernels();
    rehearses = false;
  }
}

template <ForwardVariant variant>
class ForwardLoader {
 public:
  __device__ ForwardLoader(const ForwardArguments& arguments, ForwardShared<variant>& shared)
      : a_(arguments), shared_(shared), gather_(threadIdx.x - 32, arguments.copy_bytes, arguments.counters) {}

  __device__ void run() {
    for (;; work_.advance()) {
      shared_.work.full[work_.stage()].wait(work_.parity());
      const TileWork& work = shared_.works[work_.stage()];
      if (work.sequence < 0) break;
      load(work);
      shared_.work.empty[work_.stage()].arrive();
    }
    if constexpr (variant.gather) gather_.flush();
    announce_no_more();
  }

 private:
  /// Consumers that are done with a block wait for the keys of the next, be there one or not.
  __device__ void announce_no_more() {
    shared_.k.empty[k_.stage()].wait(k_.parity() ^ 1);
    if (variant.gather || first_lane()) shared_.k.full[k_.stage()].arrive();
  }

  using Bits = unsigned short;
  using Gather = GatherLoader<3>;

  /// Whether rows of block n that no row of the sequence sees are fetched all the same. Behind the tensor's last row
  /// the copy engine brings zeros.
  __device__ bool fetches_unseen(const TileWork& work, int n) const {
    const int first_key = n * variant.block_keys;
    if (first_key < work.seen.begin) return true;
    const KeyLayout& keys = a_.problem.keys;
    const bool more_behind = keys.paged() || work.place.first_k + static_cast<long long>(work.seen.end) < keys.rows;
    return first_key + variant.block_keys > work.seen.end && more_behind;
  }

  /// Where the keys of a block are: all of them where they are not paged; else, for each lane another one, those of a
  /// box of the copy engine, or the single rows that the lane's warp gathers. What no row sees is nowhere:
  /// slot -1. Neither it nor what is in a page that there is not is fetched: zeros are.
  struct KeyPlaces {
    static constexpr int count = variant.gather ? divide_up(Gather::template rows_of_warp<variant.block_keys>, 32) : 1;
    int slot[count];
    int row[count];
  };

  __device__ int boxes() const { return variant.block_keys / a_.box_keys; }

  __device__ KeyPlaces locate(const TileWork& work, int n) const {
    const KeyLayout& keys = a_.problem.keys;
    const int first_key = n * variant.block_keys;
    KeyPlaces places;
#pragma unroll
    for (int i = 0; i < KeyPlaces::count; ++i) {
      places.slot[i] = keys.paged() ? -1 : work.place.cache_row;
      places.row[i] = keys.paged() ? 0 : work.place.first_k + first_key;
      if (!keys.paged() || n < work.blocks.begin) continue;
      const int lane = threadIdx.x % 32;
      const int span = variant.gather ? 1 : a_.box_keys;
      const int key_of_block = variant.gather ? gather_.row_of_warp(lane + 32 * i) : lane * span;
      const int key = first_key + key_of_block;
      if (key_of_block >= variant.block_keys || key >= work.seen.end || key + span <= work.seen.begin) continue;
      const unsigned position = static_cast<unsigned>(work.place.first_k) + key;
      const unsigned index = position / static_cast<unsigned>(keys.rows);
      // It is not looked at before it is used, or its loading would be waited for here.
      places.slot[i] = static_cast<int>(page_of(keys, work.place, index));
      places.row[i] = static_cast<int>(position - index * keys.rows);
    }
    return places;
  }

  __device__ void load(const TileWork& work) {
    const int begin = work.blocks.begin;
    int n = work.blocks.end - 1;
    KeyPlaces places = locate(work, n);
    load_k(work, n, places);
    load_q(work);
    KeyPlaces next = locate(work, n - 1);
#pragma unroll 1
    for (;; --n) {
      const KeyPlaces after = locate(work, n - 2);  // pages are looked up a step ahead
      if (n > begin) load_k(work, n - 1, next);
      load_v(work, n, places);
      if (n == begin) break;
      places = next;
      next = after;
    }
  }

  /// Starts fetching a block of rows, which makes up `bytes`.
  template <int padded>
  __device__ void fetch(unsigned char* tile, const TensorMap& map, ptx::Mbarrier& barrier, int bytes, int head,
                        const KeyPlaces& box) {
    if (!a_.problem.keys.paged()) {
      if (first_lane()) {
        barrier.arrive_expecting(bytes);
        load_tile<variant.block_keys>(tile, padded, map, barrier, head, box.row[0], box.slot[0]);
      }
      return;
    }
    if (first_lane()) barrier.arrive_expecting(bytes);
    __syncwarp();
    const int lane = threadIdx.x % 32;
    if (lane < boxes()) {
      load_tile<variant.block_keys>(tile + lane * a_.box_keys * chunk_row_bytes, padded, map, barrier, head, box.row[0],
                                    box.slot[0]);
    }
  }

  __device__ void await_empty(ptx::Mbarrier& empty, unsigned parity) {
    // What is still on its way may be all that consumers wait for before they release a buffer.
    if constexpr (variant.gather) {
      if (!empty.is_complete(parity ^ 1)) gather_.flush();
    }
    empty.wait(parity ^ 1);
  }

  __device__ void load_q(const TileWork& work) {
    await_empty(shared_.q.empty[q_.stage()], q_.parity());
    const Problem& p = a_.problem;
    const int slot = p.query_slot(work.sequence);
    unsigned char* const tile = shared_.q_tiles[q_.stage()].rows;
    ptx::Mbarrier& full = shared_.q.full[q_.stage()];
    if constexpr (variant.gather) {
      gather_.template load<variant.tile_rows(), variant.head_dim>(
          tile, p.head_dim, full, [&](int row, int) -> const Bits* {
            const RowPlace place = place_of(a_, work, row);
            if (place.query >= work.used) return nullptr;
            return row_of(p.q, slot, static_cast<long long>(work.place.first_q) + place.query, place.head);
          });
    } else if (first_lane()) {
      full.arrive_expecting(a_.tile_rows * chunks_of(variant.head_dim) * chunk_row_bytes);
      load_tile<variant.tile_rows()>(tile, variant.head_dim, a_.q, full, 0, work.place.first_q + work.first_query,
                                     work.unit, slot);
    }
    q_.advance();
  }

  __device__ void load_k(const TileWork& work, int n, const KeyPlaces& places) {
    await_empty(shared_.k.empty[k_.stage()], k_.parity());
    unsigned char* const tile = shared_.k_tiles[k_.stage()].rows;
    ptx::Mbarrier& full = shared_.k.full[k_.stage()];
    if constexpr (variant.gather) {
      gather_block<variant.head_dim>(work, n, places, a_.problem.k, a_.problem.head_dim, tile, full);
    } else {
      fetch<variant.head_dim>(tile, a_.k, full, variant.k_bytes(), work.head_k, places);
    }
    k_.advance();
  }

  __device__ void load_v(const TileWork& work, int n, const KeyPlaces& places) {
    await_empty(shared_.v.empty[v_.stage()], v_.parity());
    unsigned char* const tile = shared_.v_tiles[v_.stage()].rows;
    ptx::Mbarrier& full = shared_.v.full[v_.stage()];
    if constexpr (variant.gather) {
      gather_block<variant.head_dim_v>(work, n, places, a_.problem.v, a_.problem.head_dim_v, tile, full);
    } else {
      const bool clears = fetches_unseen(work, n);
      fetch<variant.head_dim_v>(tile, a_.v, clears ? shared_.v_fetched : full, variant.v_bytes(), work.head_k, places);
      if (clears) clear_unseen(work, n, tile, full);
    }
    v_.advance();
  }

  /// Values that no row of the sequence sees must not meet weights of 0, since they may be NaN.
  __device__ void clear_unseen(const TileWork& work, int n, unsigned char* tile, ptx::Mbarrier& full) {
    shared_.v_fetched.wait(v_fetched_parity_);
    v_fetched_parity_ ^= 1;
    const int first_key = n * variant.block_keys;
    const int begin = clamp(work.seen.begin - first_key, 0, variant.block_keys);
    const int end = clamp(work.seen.end - first_key, 0, variant.block_keys);
    clear_rows<variant.block_keys>(tile, variant.head_dim_v, 0, begin);
    clear_rows<variant.block_keys>(tile, variant.head_dim_v, end, variant.block_keys);
    ptx::fence_proxy_async();
    __syncwarp();
    if (first_lane()) full.arrive();
  }

  template <int padded>
  __device__ void gather_block(const TileWork& work, int n, const KeyPlaces& places, const Rows& rows, int head_dim,
                               unsigned char* tile, ptx::Mbarrier& full) {
    const int first_key = n * variant.block_keys;
    const int begin = work.seen.begin - first_key;
    const int end = work.seen.end - first_key;
    const bool paged = a_.problem.keys.paged();
    const Bits* const first = row_of(rows, paged ? 0 : places.slot[0], paged ? 0 : places.row[0], work.head_k);
    gather_.template load<variant.block_keys, padded>(tile, head_dim, full, [&](int row, int row_of_warp) {
      if (!paged) return row >= begin && row < end ? first + row * rows.row_stride : nullptr;
      const auto of_row = [&](const int(&of_lane)[KeyPlaces::count]) {
        return __shfl_sync(~0U, row_of_warp < 32 ? of_lane[0] : of_lane[KeyPlaces::count - 1], row_of_warp % 32);
      };
      const int slot = of_row(places.slot);
      const int row_of_page = of_row(places.row);
      return slot < 0 || slot >= a_.problem.keys.slots
                 ? nullptr
                 : first + slot * rows.slot_stride + row_of_page * rows.row_stride;
    });
  }

  __device__ static const Bits* row_of(const Rows& rows, long long slot, long long row, long long head) {
    return static_cast<const Bits*>(rows.data) + slot * rows.slot_stride + row * rows.row_stride +
           head * rows.head_stride;
  }

  const ForwardArguments& a_;
  ForwardShared<variant>& shared_;
  Gather gather_;
  RingPlace<ForwardShared<variant>::work_stages> work_;
  RingPlace<variant.q_stages> q_;
  RingPlace<variant.stages> k_, v_;
  unsigned v_fetched_parity_ = 0;
};

/// Named barriers: 0 is __syncthreads, then come the turns of up to three consumers, then each by itself.
inline constexpr int first_turn_barrier = 1;
inline constexpr int first_warpgroup_barrier = 4;

template <ForwardVariant variant>
class ForwardConsumer {
 public:
  static constexpr int keys = variant.block_keys;

  __device__ ForwardConsumer(const ForwardArguments& arguments, ForwardShared<variant>& shared, int group)
      : a_(arguments), shared_(shared), group_(group) {}

  /// The blocks of all tiles are one sequence: while the values of a tile's last block are multiplied, weights are made
  /// of the first block of the next.
  __device__ void run() {
    if (variant.warpgroups > 1 && group_ == variant.warpgroups - 1) pass_turn();
    TilePlace tile;
    if (!find_tile(tile)) return;
    int n = work_of(tile).blocks.end - 1;
    float sums[variant.head_dim_v / 2] = {};
    float scores[keys / 2];
    unsigned weights[keys / 4];
    float rescale[rows_of_thread];
    OnlineSoftmax softmax(a_.exponent_scale);

    await_queries();
    await_keys();
    start_scores(scores, query_matrix(), key_matrix());
    ptx::wgmma_wait<0>();
    ptx::hold(scores);
    release_keys();
    release_queries_at(tile, n);
    modify_scores(scores);
    hide_keys(scores, tile, n);
    softmax.template update<keys>(scores, rescale);
    round_weights(scores, weights);

    for (;;) {
      // Steps to blocks of the same tile that need no mask.
      const BlockRange whole = work_of(tile).whole;
      if (n > whole.begin && n <= whole.end) {
        await_keys();
        await_values();
        do {
          --n;
          start_products(scores, weights, sums);
          release_keys();
          release_queries_at(tile, n);
          modify_scores(scores);
          const bool rescales = softmax.template update<keys>(scores, rescale);
          ptx::hold(scores);
          await_keys();
          finish_values(sums);
          await_values();
          round_weights(scores, weights);
          if (__any_sync(~0U, rescales)) scale_rows<variant.head_dim_v>(sums, rescale);
        } while (n > whole.begin);
      }
      // A step to any block, perhaps the next tile's first.
      const bool last = n == work_of(tile).blocks.begin;
      bool more = true;
      TilePlace next = tile;
      if (last) {
        next.advance();
        more = find_tile(next);
      }
      const OnlineSoftmax finished = softmax;
      bool rescales = false;
      if (more) {
        if (last) {
          n = work_of(next).blocks.end;
          await_queries();
          softmax = OnlineSoftmax(a_.exponent_scale);
        }
        --n;
        await_keys();
        await_values();
        start_products(scores, weights, sums);
        release_keys();
        release_queries_at(next, n);
        modify_scores(scores);
        hide_keys(scores, next, n);
        rescales = softmax.template update<keys>(scores, rescale);
        ptx::hold(scores);
        await_values_in_use();
        finish_values(sums);
        round_weights(scores, weights);
      } else {
        await_values();
        start_values(weights, sums, value_matrix());
        ptx::wgmma_wait<0>();
        ptx::hold(sums);
      }
      if (last) {
        store(tile, sums, finished);
        if (!more) return;
#pragma unroll
        for (float& sum : sums) sum = 0;
        tile = next;
      } else if (__any_sync(~0U, rescales)) {
        scale_rows<variant.head_dim_v>(sums, rescale);
      }
    }
  }

 private:
  using ScoreTile = float (&)[keys / 2];
  using Sums = float (&)[variant.head_dim_v / 2];

  using TilePlace = RingPlace<ForwardShared<variant>::work_stages>;

  __device__ const TileWork& work_of(TilePlace tile) const { return shared_.works[tile.stage()]; }

  /// Waits for a tile. False where there are no more.
  __device__ bool find_tile(TilePlace tile) {
    shared_.work.full[tile.stage()].wait(tile.parity());
    const TileWork& work = work_of(tile);
    if (work.sequence < 0) return false;
    if (threadIdx.x == 128) shared_.begun.arrive();
    find_visible(work);
    return true;
  }

  /// Each lane for itself, since each reads what the scheduler says of the tile.
  __device__ void release_tile(TilePlace tile) { shared_.work.empty[tile.stage()].arrive(); }

  /// What the rows of this warp see, if some of it is to be hidden: found while registers are few, by a lane for each.
  __device__ void find_visible(const TileWork& work) {
    const int lane = threadIdx.x % 32;
    if (lane < 16 && (work.whole.begin > work.blocks.begin || work.whole.end < work.blocks.end)) {
      const int row = group_ * 64 + threadIdx.x % 128 / 32 * 16 + lane;
      const int query = min(place_of(a_, work, row).query, work.used - 1);
      shared_.visible[row] = visible_keys(a_.problem.mask, work.place.lengths, query);
    }
    __syncwarp();
  }

  /// Starts the scores of the next block and the values of this one, which are there, and waits for the scores.
  __device__ void start_products(ScoreTile scores, const unsigned (&weights)[keys / 4], Sums sums) {
    const unsigned q = query_matrix();
    const unsigned k = key_matrix();
    const unsigned v = value_matrix();
    if constexpr (variant.warpgroups > 1) await_turn();
    start_scores(scores, q, k);
    start_values(weights, sums, v);
    if constexpr (variant.warpgroups > 1) pass_turn();
    ptx::wgmma_wait<1>();
    ptx::hold(scores);
  }

  /// Waits for the product with the values. The assembler moves this wait up to the last branch before it, so that one
  /// has to stand between it and the weights made before it: that of a wait for a barrier, be it over already.
  __device__ void finish_values(Sums sums) {
    ptx::wgmma_wait<0>();
    ptx::hold(sums);
    release(shared_.v.empty[next_.before(2).stage()]);
  }

  __device__ unsigned query_matrix() const {
    return ptx::matrix_at(ptx::shared_address(&shared_.q_tiles[q_.stage()]) + group_ * 64 * chunk_row_bytes);
  }
  __device__ unsigned key_matrix() const {
    return ptx::matrix_at(ptx::shared_address(&shared_.k_tiles[next_.stage()]));
  }
  __device__ unsigned value_matrix() const {
    return ptx::matrix_at(ptx::shared_address(&shared_.v_tiles[next_.before(1).stage()]), keys * chunk_row_bytes);
  }

  /// Starts scores = queries x keys.
  __device__ static void start_scores(ScoreTile scores, unsigned q, unsigned k) {
    ptx::wgmma_fence();
#pragma unroll
    for (int step = 0; step < variant.head_dim / 16; ++step) {
      const int chunk = step / 4;
      const int bytes = step % 4 * 32;
      ptx::wgmma<variant.element, keys>(scores, ptx::advance(q, chunk * variant.tile_rows() * chunk_row_bytes + bytes),
                                        ptx::advance(k, chunk * keys * chunk_row_bytes + bytes), step > 0);
    }
    ptx::wgmma_commit();
  }

  /// Starts sums += weights x values.
  __device__ static void start_values(const unsigned (&weights)[keys / 4], Sums sums, unsigned v) {
    ptx::wgmma_fence();
#pragma unroll
    for (int step = 0; step < keys / 16; ++step) {
      ptx::wgmma<variant.element, variant.head_dim_v>(sums, weights + 4 * step,
                                                      ptx::advance(v, step * 16 * chunk_row_bytes));
    }
    ptx::wgmma_commit();
  }

  __device__ void modify_scores(ScoreTile scores) const {
    if constexpr (variant.scores == Scores::capped) {
#pragma unroll
      for (int i = 0; i < keys / 2; ++i) scores[i] = tanh_accurately(scores[i] * a_.score_factor);
    } else if constexpr (variant.scores == Scores::scaled) {
#pragma unroll
      for (int i = 0; i < keys / 2; ++i) scores[i] *= a_.score_factor;
    }
  }

  /// Hides from each row of scores the keys of block n that it does not see.
  __device__ void hide_keys(ScoreTile scores, TilePlace tile, int n) const {
    const TileWork& work = work_of(tile);
    const int first_key = n * keys;
    const KeyRange* const visible = shared_.visible + group_ * 64 + accumulator_row(0);
    if (first_key + keys > work.seen_by_all.end) {
      hide_keys_from<keys>(scores, visible[0].end - first_key, visible[8].end - first_key);
    }
    if (first_key < work.seen_by_all.begin) {
      hide_keys_before<keys>(scores, visible[0].begin - first_key, visible[8].begin - first_key);
    }
  }

  /// An accumulator's columns are already where the product with the values takes its first operand.
  __device__ static void round_weights(const float (&scores)[keys / 2], unsigned (&weights)[keys / 4]) {
#pragma unroll
    for (int i = 0; i < keys / 4; ++i) weights[i] = pack<variant.element>(scores[2 * i], scores[2 * i + 1]);
  }

  __device__ void store(TilePlace tile, Sums sums, const OnlineSoftmax& softmax) {
    const Problem& p = a_.problem;
    const TileWork& work = work_of(tile);
    if constexpr (variant.splits) {
      if (work.part.count > 1) {
        store_part(work, sums, softmax);
        if (is_last_part(work)) merge_parts(work);
        release_tile(tile);
        return;
      }
    }
    const int slot = p.query_slot(work.sequence);
#pragma unroll
    for (int i = 0; i < rows_of_thread; ++i) {
      const RowPlace place = place_of(a_, work, group_ * 64 + accumulator_row(i));
      const bool exists = place.query < work.capacity;
      const long long row = static_cast<long long>(work.place.first_q) + place.query;
      float share;
      float lse = softmax.finish(i, sink_of(p, place.head), share);
      if (place.query >= work.used) {
        share = 0;
        lse = -infinity();
      }
      if (__any_sync(~0U, share == 0)) clear_row_if<variant.head_dim_v>(sums, i, share == 0);
      void* const out = exists ? p.out.at(slot, row, place.head) : nullptr;
      store_row<variant.element, variant.head_dim_v>(sums, i, share, out, p.head_dim_v, a_.wide_rows);
      if (exists && p.lse.data != nullptr && accumulator_column() == 0) p.lse.at(slot, place.head, row) = lse;
    }
    release_tile(tile);
  }

  /// A row of a slot of partial results.
  __device__ long long partial_row(const TileWork& work, int part, int row) const {
    return static_cast<long long>(work.part.slot(part)) * a_.parts.rows + row;
  }

  __device__ void store_part(const TileWork& work, Sums sums, const OnlineSoftmax& softmax) const {
#pragma unroll
    for (int i = 0; i < rows_of_thread; ++i) {
      const int row = group_ * 64 + accumulator_row(i);
      const float2 weight = softmax.partial(i);
      if (place_of(a_, work, row).query >= work.used) continue;
      const long long at = partial_row(work, work.part.index, row);
      float* const target = a_.parts.sums + at * variant.head_dim_v + accumulator_column();
#pragma unroll
      for (int j = 0; j < variant.head_dim_v / 8; ++j) {
        *reinterpret_cast<float2*>(target + 8 * j) = make_float2(sums[4 * j + 2 * i], sums[4 * j + 2 * i + 1]);
      }
      if (accumulator_column() == 0) reinterpret_cast<float2*>(a_.parts.weights)[at] = weight;
    }
  }

  /// Tells that this warpgroup's part is done. Whether it was the last of its rows.
  __device__ bool is_last_part(const TileWork& work) {
    await_warpgroup();
    if (threadIdx.x % 128 == 0) {
      int* const done = a_.counters + work.part.counter * variant.warpgroups + group_;
      const bool last = ptx::add_and_synchronize(done, 1) == work.part.count - 1;
      if (last) *done = 0;
      shared_.merges[group_] = last;
    }
    await_warpgroup();
    return shared_.merges[group_];
  }

  /// The warps of this warpgroup merge the parts of its rows, each a row at a time.
  __device__ void merge_parts(const TileWork& work) const {
    const Problem& p = a_.problem;
    const int slot = p.query_slot(work.sequence);
#pragma unroll 1
    for (int row = group_ * 64 + threadIdx.x % 128 / 32; row < group_ * 64 + 64; row += 4) {
      const RowPlace place = place_of(a_, work, row);
      if (place.query >= work.capacity) return;
      const long long out_row = static_cast<long long>(work.place.first_q) + place.query;
      if (place.query >= work.used) {
        clear_row(p, slot, out_row, place.head, -infinity());
        continue;
      }
      auto* const out = static_cast<unsigned short*>(p.out.at(slot, out_row, place.head));
      const float lse = merge_row<float4, true>(
          work.part.count, sink_of(p, place.head), p.head_dim_v,
          [&](int part) {
            const auto* const weights = reinterpret_cast<const float2*>(a_.parts.weights);
            const float2 weight = __ldcg(weights + partial_row(work, part, row));
            return PartWeight{weight.x, weight.y};
          },
          [&](int part) { return a_.parts.sums + partial_row(work, part, row) * variant.head_dim_v; },
          [&](int column, const float(&sums)[4]) {
            const unsigned words[2] = {pack<variant.element>(sums[0], sums[1]),
                                       pack<variant.element>(sums[2], sums[3])};
            if (a_.wide_rows) {
              *reinterpret_cast<uint2*>(out + column) = make_uint2(words[0], words[1]);
              return;
            }
            for (int i = 0; i < 4 && column + i < p.head_dim_v; ++i) {
              out[column + i] = static_cast<unsigned short>(words[i / 2] >> i % 2 * 16);
            }
          });
      if (p.lse.data != nullptr && first_lane()) p.lse.at(slot, place.head, out_row) = lse;
    }
  }

  __device__ void await_warpgroup() const { ptx::barrier_sync(first_warpgroup_barrier + group_, 128); }
  __device__ void await_turn() const { ptx::barrier_sync(first_turn_barrier + group_, 256); }
  __device__ void pass_turn() const {
    ptx::barrier_arrive(first_turn_barrier + (group_ + 1) % variant.warpgroups, 256);
  }

  __device__ void await_queries() const { shared_.q.full[q_.stage()].wait(q_.parity()); }
  __device__ void await_keys() const { shared_.k.full[next_.stage()].wait(next_.parity()); }
  __device__ void await_values() const { shared_.v.full[next_.before(1).stage()].wait(next_.before(1).parity()); }
  /// Those that are multiplied now, so that this is over already.
  __device__ void await_values_in_use() const {
    shared_.v.full[next_.before(2).stage()].wait(next_.before(2).parity());
  }

  /// After the scores of block n of a tile: its queries are needed no more after the first block, which comes last.
  __device__ void release_queries_at(TilePlace tile, int n) {
    if (n > work_of(tile).blocks.begin) return;
    release(shared_.q.empty[q_.stage()]);
    q_.advance();
  }
  __device__ void release_keys() {
    release(shared_.k.empty[next_.stage()]);
    next_.advance();
  }

  const ForwardArguments& a_;
  ForwardShared<variant>& shared_;
  int group_;
  RingPlace<variant.q_stages> q_;
  RingPlace<variant.stages> next_;  ///< of the keys that come next; the values come a block behind
};

/// Rows of ragged tensors that belong to no sequence: out 0, lse -inf.
template <ForwardVariant variant>
__device__ void clear_rows_outside(const ForwardArguments& a) {
  const Problem& p = a.problem;
  if (!p.ragged_queries()) return;
  const int begin = clamp(p.queries.cu_seqlens[0], 0, p.queries.rows);
  const int end = clamp(p.queries.cu_seqlens[p.batch], begin, p.queries.rows);
  const int rows = begin + p.queries.rows - end;
  const int warps = variant.threads() / 32;
  for (int i = blockIdx.x * warps + threadIdx.x / 32; i < rows; i += gridDim.x * warps) {
    const int row = i < begin ? i : end + i - begin;
    for (int head = 0; head < p.heads_q; ++head) clear_row(p, 0, row, head, -infinity());
  }
}

template <ForwardVariant variant>
__device__ void forward(const ForwardArguments& a) {
  static_assert(sizeof(ForwardShared<variant>) <= variant.shared_bytes());
  extern __shared__ unsigned char memory[];
  auto& shared = *reinterpret_cast<ForwardShared<variant>*>(memory);
  if (threadIdx.x == 0) {
    if constexpr (!variant.gather) {
      for (const TensorMap* map : {&a.q, &a.k, &a.v}) ptx::prefetch(*map);
    }
    shared.init();
  }
  ptx::let_next_kernel_begin();
  __syncthreads();
  const int warpgroup = threadIdx.x / 128;
  if (warpgroup == 0) {
    if constexpr (variant.moves_registers()) ptx::give_up_registers<variant.producer_registers()>();
    if (threadIdx.x < 32) {
      if constexpr (variant.splits) {
        schedule<variant, SplitScheduler<variant>>(a, shared);
      } else {
        schedule<variant, TileScheduler<variant>>(a, shared);
      }
    } else {
      ptx::await_earlier_kernels();
      if (variant.gather || threadIdx.x < 64) ForwardLoader<variant>(a, shared).run();
    }
  } else {
    if constexpr (variant.moves_registers()) ptx::take_registers<variant.consumer_registers()>();
    ptx::await_earlier_kernels();
    ForwardConsumer<variant>(a, shared, warpgroup - 1).run();
  }
  clear_rows_outside<variant>(a);
}

}  // namespace mate::cuda
