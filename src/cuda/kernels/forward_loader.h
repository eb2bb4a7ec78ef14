// The loader of the forward kernel.
#pragma once

#include "forward_shared.h"
#include "key_finder.h"
#include "load.h"
#include "tile_rows.h"

namespace mate::cuda {

template <ForwardVariant variant>
class ForwardLoader {
 public:
  __device__ ForwardLoader(const TensorMaps& maps, const ForwardArguments& arguments, ForwardShared<variant>& shared)
      : maps_(maps),
        a_(arguments),
        shared_(shared),
        gather_(threadIdx.x - 32, arguments.copy_bytes),
        finder_(arguments, gather_),
        policy_(ptx::policy_of(arguments.served.which == Sequences::decodes)) {}

  __device__ void run() {
    Ahead ahead;
    bool found = look_up_rehearsed(ahead);
    for (;; work_.advance()) {
      if (!found) {
        shared_.work.full[work_.stage()].wait(work_.parity());
        if (shared_.works[work_.stage()].sequence < 0) break;
        ahead = finder_.look_up_last(shared_.works[work_.stage()]);
      }
      found = load(shared_.works[work_.stage()], ahead);
      shared_.work.empty[work_.again().stage()].arrive();
    }
    if constexpr (variant.scores_ahead() && !variant.widens()) {
      if (loads_keys()) announce_no_more(shared_.k, next_, variant.gather);
    }
  }

 private:
  // Rows are gathered by all warps together; else one fetches queries and keys, another one values, if there is one.
  static constexpr bool loads_all = variant.gather || variant.loader_warps() == 1;
  __device__ static bool loads_keys() { return loads_all || threadIdx.x < 64; }
  __device__ static bool loads_values() { return loads_all || threadIdx.x >= 64; }

  // Where blocks go: to consumers, or to who prepares them first.
  static constexpr int k_stages = variant.widens() ? variant.fetched_stages : variant.stages;
  static constexpr int v_stages = variant.prepares() ? variant.fetched_stages : variant.stages;
  static constexpr int k_bytes = variant.widens() ? variant.fetched_k_bytes() : variant.k_bytes();
  static constexpr int v_bytes = variant.prepares() ? variant.fetched_v_bytes() : variant.v_bytes();
  static constexpr int query_bytes = bytes_of(variant.types.query);  // of an element
  static constexpr int key_bytes = bytes_of(variant.types.key);
  using Place = RingPlace<k_stages>;
  __device__ RingBarriers<k_stages>& k_ring() const {
    if constexpr (variant.widens())
      return shared_.fetched_k;
    else
      return shared_.k;
  }
  __device__ RingBarriers<v_stages>& v_ring([[maybe_unused]] int slice) const {
    if constexpr (variant.prepares())
      return shared_.fetched_v;
    else
      return shared_.v[slice];
  }
  __device__ unsigned char* k_tile(int stage) const {
    if constexpr (variant.widens())
      return shared_.fetched_k_tiles.tiles[stage].rows;
    else
      return shared_.k_tiles[stage].rows;
  }
  __device__ unsigned char* v_tile(int stage) const {
    if constexpr (variant.prepares())
      return shared_.fetched_v_tiles.tiles[stage].rows;
    else
      return shared_.v_tiles[stage].rows;
  }

  using QueryBits = typename BitsOf<query_bytes>::Type;
  using KeyBits = typename BitsOf<key_bytes>::Type;
  using Gather = GatherLoader<variant.loader_warps()>;
  using Finder = KeyFinder<variant>;
  using Ahead = typename Finder::Ahead;
  using Places = typename Finder::Places;

  /// Whether rows of block n that no row of the sequence sees are fetched all the same. Behind the tensor's last row
  /// the copy engine brings zeros.
  __device__ bool fetches_unseen(const TileWork& work, int n) const {
    const int first_key = n * variant.block_keys;
    if (first_key < work.seen.begin) return true;
    const KeyLayout& keys = a_.problem.keys;
    const bool more_behind = keys.paged() || work.place.first_k + static_cast<long long>(work.seen.end) < keys.rows;
    return first_key + variant.block_keys > work.seen.end && more_behind;
  }

  /// Looks up the first pages of the first tile, if it was found ahead of time and is still that one, while the
  /// scheduler sees to that.
  __device__ bool look_up_rehearsed(Ahead& ahead) {
    if constexpr (variant.keeps_rehearsed()) {
      auto& rehearsal = shared_.rehearsal;
      rehearsal.rehearsed.wait(0);
      if (!rehearsal.exists) return false;
      const TileWork& work = shared_.works[0];
      const bool has_keys = work.sequence >= 0 && work.blocks.size() > 0;
      if (has_keys) ahead = finder_.look_up_last(work);
      __syncwarp();
      if (first_lane()) rehearsal.looked_up.arrive();
      shared_.work.full[0].wait(0);
      return has_keys && rehearsal.holds;
    }
    return false;
  }

  /// Looks up the first pages of the next tile, if it is known by now and there is one.
  __device__ bool look_up_next(Ahead& ahead) const {
    RingPlace<ForwardShared<variant>::work_stages> place = work_;
    place.advance();
    if (!__all_sync(~0U, shared_.work.full[place.stage()].is_complete(place.parity()))) return false;
    const TileWork& work = shared_.works[place.stage()];
    if (work.sequence < 0) return false;
    ahead = finder_.look_up_last(work);
    return true;
  }

  /// Fetches a tile. Returns whether the next one was found on the way: its first pages are then looked up, since that
  /// takes about as long as fetching a block.
  __device__ bool load(TileWork& work, Ahead& ahead) {
    const int begin = work.blocks.begin;
    const int last = work.blocks.end - 1;
    Places before{};  // of block n + 1, whose values are fetched when the keys of block n have been asked for
    bool found = false;
#pragma unroll 1
    for (int n = last;; --n) {
      Places places{};
      if (n >= begin) places = finder_.take(work, n, ahead);
      if constexpr (variant.splits) {
        if (n <= begin && !found) found = look_up_next(ahead);
      }
      // Keys are fetched ahead of values, unless there is no room for them until values are there.
      constexpr bool keys_first = k_stages > 1;
      const auto load_values = [&] {
        if (n == last || !loads_values()) return;
        if constexpr (loads_all) {
          load_v(work, n + 1, before, next_.before(keys_first && n >= begin ? 2 : 1));
        } else {
          load_v(work, n + 1, before, next_);
          next_.advance();
        }
      };
      if (!keys_first) load_values();
      if (n >= begin && loads_keys()) {
        load_k(work, n, places);
        next_.advance();
      }
      if (keys_first) load_values();
      if (n == last) {
        if (!variant.widens_queries() && loads_keys()) load_q(work);
        if (variant.splits && loads_values()) find_parts(work);
      }
      if (n < begin) return found;
      before = places;
    }
  }

  /// While the first keys are on their way; the barrier of the values tells consumers.
  __device__ void find_parts(TileWork& work) const {
    if (first_lane() && (!variant.gather || threadIdx.x < 64)) {
      const Problem& p = a_.problem;
      const Worker worker = this_worker<variant>(a_);
      int first_slot = static_cast<int>(slots_of(worker.first_index));
      if (a_.cut.parts_are_grains()) {
        const int tile = tile_number(variant.tiling(a_.pack), variant.one_tile(), p.ragged_queries(), p.queries.rows,
                                     work.sequence, work.place.first_q, work.tile);
        first_slot = (tile * a_.units + work.unit) * a_.parts.slots_of_tile;
      }
      work.parts = parts_of(a_.cut, work.shares, work.steps, work.cut, worker.number, work.blocks, first_slot);
      work.parts.counter += worker.first_index;
    }
  }

  /// What the L2 cache does with a tile's keys: those of sequences with many tiles are read again, so that those that
  /// are decoded beside prompts, or of a sequence that is one tile among others, had better not drive them out.
  __device__ ptx::CachePolicy policy_for(const TileWork& work) const {
    if constexpr (!variant.splits) return ptx::CachePolicy::evict_normal;
    if constexpr (variant.one_tile()) return policy_;
    return ptx::policy_of(work.place.query_capacity * a_.pack <= a_.rows_of_block);
  }

  /// Has the copy engine fetch columns of a box of keys or values: all chunks by one order, or chunk by chunk. For
  /// stream.h boxes lie one after another; elsewhere each is some rows of the tile's chunks.
  template <int columns>
  __device__ void fetch_box(ptx::CachePolicy policy, unsigned char* tile, int first_column, const TensorMap& map,
                            bool all_chunks, ptx::Mbarrier& barrier, int head, const Places& box) const {
    if ((variant.stream() || variant.wide) && all_chunks) {
      const int chunk = first_column / (chunk_row_bytes / key_bytes);
      load_keys_box<variant.cluster_blocks>(tile, map, barrier, policy, 0, box.row[0], chunk, head, box.slot[0]);
    } else {
      const int rows = variant.stream() ? a_.box_keys : variant.block_keys;
      load_keys<key_bytes, variant.cluster_blocks>(tile, rows * chunk_row_bytes, first_column, columns, map, barrier,
                                                   policy, head, box.row[0], box.slot[0]);
    }
  }

  /// Starts fetching columns of a block of rows.
  template <int columns>
  __device__ void fetch(const TileWork& work, unsigned char* tile, int first_column, const TensorMap& map,
                        bool all_chunks, ptx::Mbarrier& barrier, const Places& box) {
    const ptx::CachePolicy policy = policy_for(work);
    const int lane = threadIdx.x % 32;
    if constexpr (variant.box_blocks() > 1) {
      const int count = divide(a_.boxes, variant.box_blocks());
      const int first = ptx::block_of_cluster() * count;
      Places own = box;
      if (!a_.problem.keys.paged()) own.row[0] += lane * a_.box_keys;
      if (lane >= first && lane < first + count) {
        fetch_box<columns>(policy, tile + lane * a_.box_keys * chunk_row_bytes, first_column, map, all_chunks, barrier,
                           work.head_k, own);
      }
      return;
    }
    if (!a_.problem.keys.paged()) {
      if (first_lane()) fetch_box<columns>(policy, tile, first_column, map, all_chunks, barrier, work.head_k, box);
      return;
    }
    if (lane < a_.boxes) {
      constexpr int chunks_of_box = variant.stream() ? chunks_of(columns, key_bytes) : 1;
      fetch_box<columns>(policy, tile + lane * a_.box_keys * chunk_row_bytes * chunks_of_box, first_column, map,
                         all_chunks, barrier, work.head_k, box);
    }
  }

  /// Whether this block of threads, and no other of its cluster, fetches what comes in turns.
  __device__ static bool fetches([[maybe_unused]] int turn) {
    if constexpr (variant.wide && variant.cluster_blocks > 1)
      return turn % variant.cluster_blocks == ptx::block_of_cluster();
    return true;
  }

  /// Tells the barrier how many bytes this warp is about to fetch.
  __device__ static void expect(ptx::Mbarrier& barrier, int bytes) {
    if (first_lane()) barrier.arrive_expecting(bytes);
    __syncwarp();
  }

  __device__ void load_q(const TileWork& work) {
    const auto to = work_.again().template in<variant.q_stages>();  // tiles are as many as their queries
    shared_.q.empty[to.stage()].wait(to.parity() ^ 1);
    const Problem& p = a_.problem;
    const int slot = p.query_slot(work.sequence);
    unsigned char* const tile = shared_.q_tiles[to.stage()].rows;
    ptx::Mbarrier& full = shared_.q.full[to.stage()];
    [[maybe_unused]] constexpr int qv_offset = variant.qv_offset();
    if constexpr (variant.gather) {
      const auto gather = [&]<int padded>(unsigned char* part, const Rows& rows, int head_dim) {
        gather_.template copy<variant.tile_rows(), padded>(part, head_dim, [&](int row, int) -> const QueryBits* {
          const RowPlace place = place_of(a_, work, row);
          if (place.query >= work.used) return nullptr;
          return rows.at<const QueryBits>(slot, row_in_tensor(work, place), place.head);
        });
      };
      gather.template operator()<variant.head_dim>(tile, p.q, p.head_dim);
      if constexpr (variant.qv) gather.template operator()<variant.head_dim_v>(tile + qv_offset, p.qv, p.head_dim_v);
      gather_.arrive(full);
    } else if (first_lane()) {
      full.arrive_expecting(a_.rows_of_block * variant.q_chunks() * chunk_row_bytes);
      const int row = work.place.first_q + work.first_query;
      load_tile<variant.tile_rows(), query_bytes>(tile, variant.head_dim, maps_.q, full, 0, row, work.unit, slot);
      if constexpr (variant.qv) {
        load_tile<variant.tile_rows(), query_bytes>(tile + qv_offset, variant.head_dim_v, maps_.qv, full, 0, row,
                                                    work.unit, slot);
      }
    }
  }

  __device__ void load_k(const TileWork& work, int n, const Places& places) {
    k_ring().empty[next_.stage()].wait(next_.parity() ^ 1);
    unsigned char* const tile = k_tile(next_.stage());
    ptx::Mbarrier& full = k_ring().full[next_.stage()];
    if constexpr (variant.gather) {
      gather_block<variant.head_dim>(work, n, places, a_.problem.k, a_.problem.head_dim, tile, full);
    } else {
      expect(full, k_bytes);
      if (fetches(n)) fetch<variant.head_dim>(work, tile, 0, maps_.k, a_.all_chunks_k, full, places);
    }
  }

  __device__ void load_v(const TileWork& work, int n, const Places& places, Place place_of_keys) {
    const auto place = place_of_keys.template in<v_stages>();
    unsigned char* const tile = v_tile(place.stage());
    const auto await_empty = [&](int slice) { v_ring(slice).empty[place.stage()].wait(place.parity() ^ 1); };
    if constexpr (variant.gather) {
      await_empty(0);
      gather_block<variant.head_dim_v>(work, n, places, a_.problem.v, a_.problem.head_dim_v, tile,
                                       v_ring(0).full[place.stage()]);
    } else {
      constexpr int slices = variant.v_slices();
      constexpr int columns = variant.head_dim_v / slices;
      const bool clears = !variant.prepares() && !variant.keys_are_rows() && fetches_unseen(work, n);
      if (clears) expect(shared_.v_fetched[place.stage()], v_bytes);
#pragma unroll 1
      for (int slice = 0; slice < slices; ++slice) {
        await_empty(slice);
        ptx::Mbarrier& fetched = clears ? shared_.v_fetched[place.stage()] : v_ring(slice).full[place.stage()];
        if (!clears) expect(fetched, v_bytes / slices);
        if (!fetches(slice)) continue;
        fetch<columns>(work, tile + v_bytes / slices * slice, slice * columns, maps_.v, a_.all_chunks_v, fetched,
                       places);
      }
      if (!clears) return;
      clear_fetched(work, n, tile, place.stage());
#pragma unroll 1
      for (int slice = 0; slice < slices; ++slice) {
        if (first_lane()) v_ring(slice).full[place.stage()].arrive();
      }
    }
  }

  /// Clears what no row sees once it is there.
  __device__ void clear_fetched(const TileWork& work, int n, unsigned char* tile, int stage) {
    shared_.v_fetched[stage].wait(v_fetched_parities_ >> stage & 1);
    v_fetched_parities_ ^= 1U << stage;
    clear_unseen(tile, pieces_of(variant.head_dim_v, key_bytes), work.seen, n * variant.block_keys, variant.block_keys,
                 [](int row, int piece) { return piece_offset<variant.block_keys>(row, piece); });
    ptx::fence_proxy_async();
    __syncwarp();
  }

  template <int padded>
  __device__ void gather_block(const TileWork& work, int n, const Places& places, const Rows& rows, int head_dim,
                               unsigned char* tile, ptx::Mbarrier& full) {
    const int first_key = n * variant.block_keys;
    const int begin = work.seen.begin - first_key;
    const int end = work.seen.end - first_key;
    const KeyLayout& keys = a_.problem.keys;
    if (!keys.paged()) {
      const KeyBits* const first = rows.at<const KeyBits>(places.slot[0], places.row[0], work.head_k);
      gather_.template copy<variant.block_keys, padded>(tile, head_dim, [&](int row, int) -> const KeyBits* {
        return row >= begin && row < end ? first + row * rows.row_stride : nullptr;
      });
      gather_.arrive(full);
      return;
    }
    // Each lane finds rows of its own and hands them to those that copy them.
    const KeyBits* of_lane[Places::size];
#pragma unroll
    for (int i = 0; i < Places::size; ++i) {
      const bool exists = places.slot[i] >= 0 && places.slot[i] < keys.slots;
      of_lane[i] = exists ? rows.at<const KeyBits>(places.slot[i], places.row[i], work.head_k) : nullptr;
    }
    gather_.template copy<variant.block_keys, padded>(tile, head_dim, [&](int, unsigned row_of_warp) {
      return from_lane(row_of_warp < 32 ? of_lane[0] : of_lane[Places::size - 1], row_of_warp % 32);
    });
    gather_.arrive(full);
  }

  const TensorMaps& maps_;
  const ForwardArguments& a_;
  ForwardShared<variant>& shared_;
  Gather gather_;
  Finder finder_;
  ptx::CachePolicy policy_;  ///< of keys and values, where all tiles' are alike
  RingPlace<ForwardShared<variant>::work_stages> work_;
  Place next_;                       ///< of the blocks that this warp fetches: where it fetches both, of the keys
  unsigned v_fetched_parities_ = 0;  ///< a bit for each stage
};

}  // namespace mate::cuda
