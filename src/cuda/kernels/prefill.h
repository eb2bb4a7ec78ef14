// Attention where queries are many: prefill.
//
// A block of threads stays on its multiprocessor and takes tiles of query rows until there are none left. One
// warpgroup schedules and loads; the others, each with 64 rows of the tile, multiply:
//
// | who                               | does                                                 | waits for  | tells | |
// --------------------------------- | ---------------------------------------------------- | ---------- | ---------- |
// | warp 0: scheduler                 | takes a tile, finds its sequence and keys            | work.empty | work.full |
// | warp 1: loader, one lane issuing  | fetches the tile's queries                           | q.empty    | q.full | |
// copies (warps 1 to 3, all lanes,  | fetches a block of keys, the last block first        | k.empty    | k.full     |
// | where rows are gathered)          | fetches a block of values                            | v.empty    | v.full | |
// each consumer                     | starts scores = queries x keys of the next block     | k.full     |            |
// |                                   | starts sums += weights x values of this block        | v.full     | | | | makes
// weights of the scores while the values' run on |            | k.empty    | |                                   |
// rescales the sums where a row's maximum has grown    |            | v.empty    | | | after the last block stores sums
// and log-sum-exp     |            | q.empty    |
//
// So the matrix units work while weights are made. Where consumers go `in_turns`, each starts both products only when
// the one before it has started its own: they stay a step apart, and one makes weights while another multiplies.
// Registers move from the producer to the consumers (setmaxnreg): a consumer holds its 64 rows of scores, weights and
// sums in them.
#pragma once

#include "load.h"
#include "ptx/wgmma.h"
#include "softmax.h"
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
  __device__ void advance() { ++count_; }

 private:
  unsigned count_ = 0;
};

template <int bytes>
struct alignas(1024) TileBuffer {
  unsigned char rows[bytes];
};

template <PrefillVariant variant>
struct PrefillShared {
  static constexpr int work_stages = 2;
  static constexpr int loader_warps = variant.gather ? 3 : 1;

  TileBuffer<variant.q_bytes()> q_tiles[variant.q_stages];
  TileBuffer<variant.k_bytes()> k_tiles[variant.stages];
  TileBuffer<variant.v_bytes()> v_tiles[variant.stages];
  TileWork works[work_stages];
  RingBarriers<variant.q_stages> q;
  RingBarriers<variant.stages> k, v;
  RingBarriers<work_stages> work;
  ptx::Mbarrier v_fetched;  ///< of a block of values that the loader changes before consumers may have it

  __device__ void init() {
    constexpr int producers = variant.gather ? loader_warps * 32 : 1;
    constexpr int consumer_warps = 4 * variant.warpgroups;
    q.init(producers, consumer_warps);
    k.init(producers, consumer_warps);
    v.init(producers, consumer_warps);
    work.init(1, loader_warps + consumer_warps);
    v_fetched.init(1);
    ptx::fence_mbarrier_init();
  }
};

/// A warp writes a row of out that is 0, and its log-sum-exp.
__device__ inline void clear_row(const Problem& p, int slot, long long row, int head, float lse) {
  const int lane = threadIdx.x % 32;
  auto* const elements = static_cast<unsigned short*>(p.out.at(slot, row, head));
  for (int column = lane; column < p.head_dim_v; column += 32) elements[column] = 0;
  if (p.lse.data != nullptr && lane == 0) p.lse.at(slot, head, row) = lse;
}

__device__ inline bool first_lane() { return threadIdx.x % 32 == 0; }

/// Each warp that has done with a buffer says so.
__device__ inline void release(ptx::Mbarrier& empty) {
  if (first_lane()) empty.arrive();
}

template <PrefillVariant variant>
__device__ void schedule(const PrefillArguments& a, PrefillShared<variant>& shared) {
  TileScheduler<variant> scheduler(a);
  for (RingPlace<PrefillShared<variant>::work_stages> place;; place.advance()) {
    shared.work.empty[place.stage()].wait(place.parity() ^ 1);
    const bool found = scheduler.next(shared.works[place.stage()]);
    if (first_lane()) shared.work.full[place.stage()].arrive();
    if (!found) return;
  }
}

template <PrefillVariant variant>
class PrefillLoader {
 public:
  __device__ PrefillLoader(const PrefillArguments& arguments, PrefillShared<variant>& shared)
      : a_(arguments), shared_(shared), gather_(threadIdx.x - 32, arguments.copy_bytes, arguments.tiles_taken) {}

  __device__ void run() {
    for (;; work_.advance()) {
      shared_.work.full[work_.stage()].wait(work_.parity());
      const TileWork& work = shared_.works[work_.stage()];
      if (work.sequence < 0) break;
      if (work.blocks.size() > 0) load(work);
      __syncwarp();
      release(shared_.work.empty[work_.stage()]);
    }
    if constexpr (variant.gather) gather_.flush();
  }

 private:
  using Bits = unsigned short;

  /// What the loads of a tile's blocks have in common. Loading a block takes few instructions: consumers wait for each.
  struct Blocks {
    int head;
    int first_row;  ///< of key 0
    int slot;
    int clear_low;   ///< blocks of which the first or last rows are seen by no row of the sequence, but are there;
    int clear_high;  ///< -1 where there is none
  };

  __device__ Blocks blocks_of(const TileWork& work) const {
    const KeyRange seen = work.seen;
    Blocks blocks;
    blocks.head = work.unit * a_.pack / a_.problem.group();
    blocks.first_row = work.place.first_k;
    blocks.slot = work.place.cache_row;
    // Behind the tensor's last row the copy engine brings zeros.
    const bool more_behind = blocks.first_row + static_cast<long long>(seen.end) < a_.problem.keys.rows;
    blocks.clear_low = seen.begin % variant.block_keys != 0 ? seen.begin / variant.block_keys : -1;
    blocks.clear_high = seen.end % variant.block_keys != 0 && more_behind ? seen.end / variant.block_keys : -1;
    return blocks;
  }

  __device__ void load(const TileWork& work) {
    load_q(work);
    const Blocks blocks = blocks_of(work);
    const int begin = work.blocks.begin;
    int n = work.blocks.end - 1;
    load_k(work, blocks, n);
    for (; n > begin; --n) {
      load_k(work, blocks, n - 1);
      load_v(work, blocks, n);
    }
    load_v(work, blocks, n);
  }

  __device__ void load_q(const TileWork& work) {
    // What is still on its way may be all that consumers wait for before they release a buffer.
    if constexpr (variant.gather) gather_.flush();
    shared_.q.empty[q_.stage()].wait(q_.parity() ^ 1);
    const Problem& p = a_.problem;
    const int slot = p.query_slot(work.sequence);
    unsigned char* const tile = shared_.q_tiles[q_.stage()].rows;
    ptx::Mbarrier& full = shared_.q.full[q_.stage()];
    if constexpr (variant.gather) {
      const int pack = a_.pack;
      const TileRows rows = rows_of_tile(variant.tiling(pack), work.used, work.tile);
      gather_.template load<variant.tile_rows()>(tile, p.head_dim, variant.head_dim, full, [&](int row) -> const Bits* {
        const long long packed = rows.first + row;
        if (packed > rows.last) return nullptr;
        return row_of(p.q, slot, work.place.first_q + packed / pack, work.unit * pack + packed % pack);
      });
    } else if (first_lane()) {
      full.arrive_expecting(variant.q_bytes());
      load_tile<variant.tile_rows()>(tile, variant.head_dim, a_.q, full, 0, work.place.first_q + work.first_query,
                                     work.unit, slot);
    }
    q_.advance();
  }

  __device__ void load_k(const TileWork& work, const Blocks& blocks, int n) {
    shared_.k.empty[k_.stage()].wait(k_.parity() ^ 1);
    unsigned char* const tile = shared_.k_tiles[k_.stage()].rows;
    ptx::Mbarrier& full = shared_.k.full[k_.stage()];
    if constexpr (variant.gather) {
      gather_block(work, blocks, n, a_.problem.k, a_.problem.head_dim, variant.head_dim, tile, full);
    } else if (first_lane()) {
      full.arrive_expecting(variant.k_bytes());
      load_tile<variant.block_keys>(tile, variant.head_dim, a_.k, full, blocks.head,
                                    blocks.first_row + n * variant.block_keys, blocks.slot);
    }
    k_.advance();
  }

  __device__ void load_v(const TileWork& work, const Blocks& blocks, int n) {
    shared_.v.empty[v_.stage()].wait(v_.parity() ^ 1);
    unsigned char* const tile = shared_.v_tiles[v_.stage()].rows;
    ptx::Mbarrier& full = shared_.v.full[v_.stage()];
    if constexpr (variant.gather) {
      gather_block(work, blocks, n, a_.problem.v, a_.problem.head_dim_v, variant.head_dim_v, tile, full);
    } else {
      const bool clears = n == blocks.clear_low || n == blocks.clear_high;
      ptx::Mbarrier& fetched = clears ? shared_.v_fetched : full;
      if (first_lane()) {
        fetched.arrive_expecting(variant.v_bytes());
        load_tile<variant.block_keys>(tile, variant.head_dim_v, a_.v, fetched, blocks.head,
                                      blocks.first_row + n * variant.block_keys, blocks.slot);
      }
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

  __device__ void gather_block(const TileWork& work, const Blocks& blocks, int n, const Rows& rows, int head_dim,
                               int padded, unsigned char* tile, ptx::Mbarrier& full) {
    gather_.template load<variant.block_keys>(tile, head_dim, padded, full, [&](int row) -> const Bits* {
      const int key = n * variant.block_keys + row;
      if (key < work.seen.begin || key >= work.seen.end) return nullptr;
      const Location place = locate_key(a_.problem.keys, work.place, key);
      return row_of(rows, place.slot, place.row, blocks.head);
    });
  }

  __device__ static const Bits* row_of(const Rows& rows, long long slot, long long row, long long head) {
    return static_cast<const Bits*>(rows.data) + slot * rows.slot_stride + row * rows.row_stride +
           head * rows.head_stride;
  }

  const PrefillArguments& a_;
  PrefillShared<variant>& shared_;
  GatherLoader<96> gather_;
  RingPlace<PrefillShared<variant>::work_stages> work_;
  RingPlace<variant.q_stages> q_;
  RingPlace<variant.stages> k_, v_;
  unsigned v_fetched_parity_ = 0;
};

/// Named barriers: 0 is __syncthreads, then come the turns of up to three consumers.
inline constexpr int first_turn_barrier = 1;

template <PrefillVariant variant>
class PrefillConsumer {
 public:
  static constexpr int keys = variant.block_keys;

  __device__ PrefillConsumer(const PrefillArguments& arguments, PrefillShared<variant>& shared, int group)
      : a_(arguments), shared_(shared), group_(group) {}

  /// The blocks of all tiles are one sequence: while the values of a tile's last block are multiplied, weights are made
  /// of the first block of the next.
  __device__ void run() {
    if (variant.in_turns && group_ == variant.warpgroups - 1) pass_turn();
    int tile = next_tile();
    if (tile < 0) return;
    begin_tile(tile);
    int n = blocks_.end - 1;
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
    if (n == blocks_.begin) release_queries();
    modify_scores(scores);
    hide_keys(scores, mask_block(tile, n));
    softmax.template update<keys>(scores, rescale);
    round_weights(scores, weights);

    for (;;) {
      const auto next_is_plain = [&] { return n > whole_.begin && n <= whole_.end; };
      if (next_is_plain()) {
        await_keys();
        await_values();
      }
      // Steps to a block that needs no mask, and is not its tile's last: so there is another one to wait for.
      for (; next_is_plain(); --n) {
        start_products(scores, weights, sums);
        release_keys();
        modify_scores(scores);
        const bool rescales = softmax.template update<keys>(scores, rescale);
        ptx::hold(scores);
        await_keys();
        finish_values(sums);
        await_values();
        round_weights(scores, weights);
        if (__any_sync(~0U, rescales)) scale_rows<variant.head_dim_v>(sums, rescale);
      }
      // A step to any block, perhaps the next tile's first.
      const bool last = n == blocks_.begin;
      const int next = last ? next_tile() : tile;
      if (next < 0) break;
      if (last) {
        begin_tile(next);
        n = blocks_.end;
        await_queries();
      }
      --n;
      const BlockMask mask = mask_block(next, n);
      await_keys();
      await_values();
      start_products(scores, weights, sums);
      release_keys();
      if (n == blocks_.begin) release_queries();
      modify_scores(scores);
      hide_keys(scores, mask);
      const OnlineSoftmax finished = softmax;
      if (last) softmax = OnlineSoftmax(a_.exponent_scale);
      const bool rescales = softmax.template update<keys>(scores, rescale);
      ptx::hold(scores);
      await_values();
      finish_values(sums);
      round_weights(scores, weights);
      if (last) {
        store(tile, sums, finished);
#pragma unroll
        for (float& sum : sums) sum = 0;
        tile = next;
      } else if (__any_sync(~0U, rescales)) {
        scale_rows<variant.head_dim_v>(sums, rescale);
      }
    }

    await_values();
    start_values(weights, sums, value_matrix());
    ptx::wgmma_wait<0>();
    ptx::hold(sums);
    store(tile, sums, softmax);
  }

 private:
  using ScoreTile = float (&)[keys / 2];
  using Sums = float (&)[variant.head_dim_v / 2];

  /// The next tile that has keys, by its place in the ring; -1 where there is none. Clears those without.
  __device__ int next_tile() {
    for (;; work_.advance()) {
      shared_.work.full[work_.stage()].wait(work_.parity());
      const TileWork& work = shared_.works[work_.stage()];
      if (work.sequence < 0) return -1;
      if (work.blocks.size() > 0) break;
      clear_tile(work);
      release_tile(work_.stage());
    }
    const int tile = work_.stage();
    work_.advance();
    return tile;
  }

  __device__ void release_tile(int tile) {
    __syncwarp();
    release(shared_.work.empty[tile]);
  }

  __device__ void begin_tile(int tile) {
    const TileWork& work = shared_.works[tile];
    blocks_ = work.blocks;
    whole_.begin = max(blocks_.begin + 1, static_cast<int>(divide_up(work.seen_by_all.begin, keys)));
    whole_.end = work.seen_by_all.end / keys;
  }

  /// Starts the scores of the next block and the values of this one, which are there, and waits for the scores.
  __device__ void start_products(ScoreTile scores, const unsigned (&weights)[keys / 4], Sums sums) {
    const unsigned q = query_matrix();
    const unsigned k = key_matrix();
    const unsigned v = value_matrix();
    await_turn();
    start_scores(scores, q, k);
    start_values(weights, sums, v);
    pass_turn();
    ptx::wgmma_wait<1>();
    ptx::hold(scores);
  }

  /// Waits for the product with the values. The assembler moves this wait up to the last branch before it, so that one
  /// has to stand between it and the weights made before it: that of a wait for a barrier, be it over already.
  __device__ void finish_values(Sums sums) {
    ptx::wgmma_wait<0>();
    ptx::hold(sums);
    release(shared_.v.empty[v_.stage()]);
    v_.advance();
  }

  __device__ unsigned query_matrix() const {
    return ptx::matrix_at(ptx::shared_address(&shared_.q_tiles[q_.stage()]) + group_ * 64 * chunk_row_bytes);
  }
  __device__ unsigned key_matrix() const { return ptx::matrix_at(ptx::shared_address(&shared_.k_tiles[k_.stage()])); }
  __device__ unsigned value_matrix() const {
    return ptx::matrix_at(ptx::shared_address(&shared_.v_tiles[v_.stage()]), keys * chunk_row_bytes);
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

  /// Which keys of a block are to be hidden from this thread's rows.
  struct BlockMask {
    bool hides_begin = false;
    bool hides_end = false;
    KeyRange visible[rows_of_thread];  ///< counted from the block's first key
  };
  __device__ BlockMask mask_block(int tile, int n) const {
    const TileWork& work = shared_.works[tile];
    const int first_key = n * keys;
    BlockMask mask;
    mask.hides_begin = first_key < work.seen_by_all.begin;
    mask.hides_end = first_key + keys > work.seen_by_all.end;
    if (mask.hides_begin || mask.hides_end) {
      const Lengths lengths = work.place.lengths;
#pragma unroll
      for (int i = 0; i < rows_of_thread; ++i) {
        const int query = clamp(place_of(work, accumulator_row(i)).query, 0, work.used - 1);
        const KeyRange range = visible_keys(a_.problem.mask, lengths, query);
        mask.visible[i] = {range.begin - first_key, range.end - first_key};
      }
    }
    return mask;
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

  __device__ static void hide_keys(ScoreTile scores, const BlockMask& mask) {
    if (mask.hides_end) hide_keys_from<keys>(scores, mask.visible);
    if (mask.hides_begin) hide_keys_before<keys>(scores, mask.visible);
  }

  /// An accumulator's columns are already where the product with the values takes its first operand.
  __device__ static void round_weights(const float (&scores)[keys / 2], unsigned (&weights)[keys / 4]) {
#pragma unroll
    for (int i = 0; i < keys / 4; ++i) weights[i] = pack<variant.element>(scores[2 * i], scores[2 * i + 1]);
  }

  /// Which query a row of this consumer's 64 belongs to.
  struct RowPlace {
    int query;
    int head;
  };
  __device__ RowPlace place_of(const TileWork& work, int row) const {
    const unsigned packed = work.first_head + group_ * 64 + row;
    const unsigned pack = a_.pack;
    return {work.first_query + static_cast<int>(packed / pack), work.unit * a_.pack + static_cast<int>(packed % pack)};
  }

  __device__ void store(int tile, Sums sums, const OnlineSoftmax& softmax) {
    const Problem& p = a_.problem;
    const TileWork& work = shared_.works[tile];
    const int slot = p.query_slot(work.sequence);
#pragma unroll
    for (int i = 0; i < rows_of_thread; ++i) {
      const RowPlace place = place_of(work, accumulator_row(i));
      const bool exists = place.query < work.capacity;
      const bool computed = place.query < work.used;
      float share;
      const float lse = softmax.finish(i, sink_of(place.head), share);
      const long long row = static_cast<long long>(work.place.first_q) + place.query;
      store_row<variant.element, variant.head_dim_v>(sums, i, computed ? share : 0,
                                                     exists ? p.out.at(slot, row, place.head) : nullptr, p.head_dim_v,
                                                     a_.wide_rows);
      if (exists && p.lse.data != nullptr && accumulator_column() == 0) {
        p.lse.at(slot, place.head, row) = computed ? lse : -infinity();
      }
    }
    release_tile(tile);
  }

  /// A tile whose rows see no keys, or are not to be computed.
  __device__ void clear_tile(const TileWork& work) const {
    const Problem& p = a_.problem;
    const int first = threadIdx.x % 128 / 32 * 16;
    for (int row = first; row < first + 16; ++row) {
      const RowPlace place = place_of(work, row);
      if (place.query >= work.capacity) return;
      clear_row(p, p.query_slot(work.sequence), static_cast<long long>(work.place.first_q) + place.query, place.head,
                place.query < work.used ? sink_of(place.head) : -infinity());
    }
  }

  __device__ float sink_of(int head) const {
    const Sink& sink = a_.problem.sink;
    return sink.given() ? widen(sink.at(head), sink.type) : -infinity();
  }

  __device__ void await_turn() const {
    if constexpr (variant.in_turns) ptx::barrier_sync(first_turn_barrier + group_, 256);
  }
  __device__ void pass_turn() const {
    if constexpr (variant.in_turns) {
      ptx::barrier_arrive(first_turn_barrier + (group_ + 1) % variant.warpgroups, 256);
    }
  }

  __device__ void await_queries() const { shared_.q.full[q_.stage()].wait(q_.parity()); }
  __device__ void await_keys() const { shared_.k.full[k_.stage()].wait(k_.parity()); }
  __device__ void await_values() const { shared_.v.full[v_.stage()].wait(v_.parity()); }

  __device__ void release_queries() {
    release(shared_.q.empty[q_.stage()]);
    q_.advance();
  }
  __device__ void release_keys() {
    release(shared_.k.empty[k_.stage()]);
    k_.advance();
  }

  const PrefillArguments& a_;
  PrefillShared<variant>& shared_;
  int group_;
  RingPlace<PrefillShared<variant>::work_stages> work_;
  RingPlace<variant.q_stages> q_;
  RingPlace<variant.stages> k_, v_;
  BlockRange blocks_;  ///< of the tile,
  BlockRange whole_;   ///< and those but the first that every row of the tile sees whole
};

/// Rows of ragged tensors that belong to no sequence: out 0, lse -inf.
template <PrefillVariant variant>
__device__ void clear_rows_outside(const PrefillArguments& a) {
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

template <PrefillVariant variant>
__device__ void prefill(const PrefillArguments& a) {
  static_assert(sizeof(PrefillShared<variant>) <= variant.shared_bytes());
  extern __shared__ unsigned char memory[];
  auto& shared = *reinterpret_cast<PrefillShared<variant>*>(memory);
  if (threadIdx.x == 0) {
    if constexpr (!variant.gather) {
      for (const TensorMap* map : {&a.q, &a.k, &a.v}) ptx::prefetch(*map);
    }
    shared.init();
  }
  __syncthreads();
  const int warpgroup = threadIdx.x / 128;
  if (warpgroup == 0) {
    ptx::give_up_registers<variant.producer_registers()>();
    if (threadIdx.x < 32) {
      schedule(a, shared);
    } else if (variant.gather || threadIdx.x < 64) {
      PrefillLoader<variant>(a, shared).run();
    }
  } else {
    ptx::take_registers<variant.consumer_registers()>();
    PrefillConsumer<variant>(a, shared, warpgroup - 1).run();
  }
  clear_rows_outside<variant>(a);
}

}  // namespace mate::cuda
