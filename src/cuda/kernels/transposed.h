// Attention over e4m3 with wide heads, and with scores of values too (qv): what wide.h does for elements of 16 bits,
// with products that are transposed, as in stream.h.
//
// Keys, and columns of values, are rows of the products' first operands, which come from registers: there e4m3 is
// widened on its way from where it was fetched, so that shared memory holds twice as many keys. Query rows are the
// products' columns, of which there may be 16, 32 or 64: those of a decoded token are not padded to 64.
//
// Widening takes about as many instructions as all else. So some warpgroups, the scorers, make weights, and others, the
// adders, add weighted values, each in half of their columns: four warps or five that a multiprocessor's scheduler
// finds something to do for. Two scorers, where registers suffice for them, take blocks in turns. Scheduler and loaders
// are those of forward.h:
//
// | who                    | does                                                    | waits for      | tells         |
// | ---------------------- | ------------------------------------------------------- | -------------- | ------------- |
// | scheduler, loaders     | as in forward.h; qv is loaded behind q                  |                |               |
// | scorers, of a tile     | order the queries' columns as operands have them, make  | q.full         | each other    |
// |                        | float16 of them, and find what rows see                 |                | q.empty       |
// | a scorer, of its block | scores = keys x queries (+ values x queries of values)  | k.full, v.full | k.empty       |
// |                        | finds each row's largest score so far, in its own warps | weights.full   |               |
// |                        | and the block before                                    |                |               |
// |                        | makes weights, and puts them in shared memory with what | weights.empty  | weights.full  |
// |                        | sums are to be multiplied by before they are added, and |                |               |
// |                        | with its last block of a part the sums of its weights   |                |               |
// | adders, of each block  | rescale their sums where a row's maximum has grown      | weights.full   |               |
// |                        | sums += values, transposed, x weights                   | v.full         | v.empty,      |
// |                        |                                                         |                | weights.empty |
// | after the last block   | store their columns of out or of a part                 | each other     |               |
#pragma once

#include "consumer.h"
#include "transposed_operands.h"

namespace mate::cuda {

/// What scorers and adders have in common.
template <ForwardVariant variant>
class TransposedConsumer : protected Consumer<variant> {
 protected:
  static constexpr int keys = variant.block_keys;
  static constexpr int rows = variant.tile_rows();
  static constexpr int row_tiles = rows / 8;
  /// Of the sums of a product: register 4 r + 2 i + c is of row i, of two, of its first operand, and of query row
  /// 8 r + row_of(lane) + c.
  static constexpr int registers_of_product = rows / 2;
  static constexpr ElementType element = ElementType::float16;
  static_assert(variant.element() == element && keys == 64 && rows % 16 == 0);
  // Places go on evenly where they are counted beyond what an integer holds, and before the first.
  static_assert((variant.p_tiles() == 4 || variant.p_tiles() == 2) && variant.p_tiles() % variant.scorers() == 0);

  using Base = Consumer<variant>;
  using typename Base::TilePlace;
  using WeightsPlace = RingPlace<variant.p_tiles()>;

  using Base::Base;

  // What follows from the thread is not worth registers all along.
  __device__ static unsigned thread_of_block() {
    return static_cast<unsigned>(ptx::known_only_here(static_cast<int>(threadIdx.x)));
  }
  __device__ static unsigned thread_of_warpgroup() { return thread_of_block() % 128; }
  /// Among consumers.
  __device__ static int warpgroup() {
    return static_cast<int>(thread_of_block() / 128) - variant.producer_warpgroups();
  }
  /// Of a lane's two query rows of every eight, the first.
  __device__ static unsigned row_of(unsigned lane) { return lane % 4 * 2; }
  __device__ static const float2& pair_at(const float* numbers) { return *reinterpret_cast<const float2*>(numbers); }
  __device__ static float2& pair_at(float* numbers) { return *reinterpret_cast<float2*>(numbers); }

  /// What is known of a tile, its place found anew: it is not worth a register all along.
  __device__ const TileWork& work_of(TilePlace tile) const { return Base::work_of(tile.again()); }
  __device__ const TileScales& scales_of(TilePlace tile) const { return Base::scales_of(tile.again()); }
};

template <ForwardVariant variant>
class Scorer : TransposedConsumer<variant> {
 public:
  using TransposedConsumer<variant>::TransposedConsumer;

  __device__ void run() {
    for (TilePlace tile; find_tile(tile); tile.advance()) {
      prepare_rows(tile);
      this->for_each_part(tile, [&](BlockRange blocks) { score_part(tile, blocks); });
      if constexpr (!variant.widens_queries()) release_read<variant>(shared_.q.empty[queries_of(tile).stage()]);
      await_scorers();  // they have done with what is known of this tile's rows
      release_tile(tile);
    }
  }

 private:
  using Base = TransposedConsumer<variant>;
  using Base::a_;
  using Base::await;
  using Base::await_queries;
  using Base::element;
  using Base::find_tile;
  using Base::keys;
  using Base::next_;
  using Base::pair_at;
  using Base::queries_of;
  using Base::query_matrix;
  using Base::registers_of_product;
  using Base::release_tile;
  using Base::row_of;
  using Base::row_tiles;
  using Base::rows;
  using Base::scales_of;
  using Base::shared_;
  using Base::thread_of_block;
  using Base::thread_of_warpgroup;
  using Base::warpgroup;
  using Base::work_of;
  using typename Base::TilePlace;
  using typename Base::WeightsPlace;

  static constexpr int scorers = variant.scorers();
  // Each of two waits for every other block: with one stage parity would not tell its next one from its last.
  static_assert(scorers == 1 || (scorers == 2 && variant.stages > 1));
  static constexpr int threads = 128 * scorers;
  /// Steps of a product whose operands are widened together.
  static constexpr int steps_at_once = 2;
  /// Row i of a product is this warp's key key_of(lane_row()), of eight, and the one 8 behind it.
  using Scores = float (&)[registers_of_product];
  /// What a lane has added up of the weights of each of its rows.
  using RowSums = float (&)[row_tiles][2];

  __device__ static int thread() { return static_cast<int>(thread_of_block()) - 128 * variant.producer_warpgroups(); }
  __device__ void await_scorers() const { ptx::barrier_sync(first_turn_barrier + scorers, threads); }
  __device__ void await_own_warps() const { ptx::barrier_sync(first_turn_barrier + warpgroup(), 128); }

  // --- rows

  __device__ void prepare_rows(TilePlace tile) {
    const TileWork& work = work_of(tile);
    if constexpr (!variant.widens_queries()) await_queries(tile);
#pragma unroll 1
    for (int row = thread() / 32; row < rows; row += threads / 32) prepare_queries(tile, row);
    if (const int row = thread(); row < rows) {
      const int query = min(place_of(a_, work, row).query, work.used - 1);
      shared_.rows.visible[row] = visible_keys(a_.problem.mask, work.place.lengths, query);
    }
    ptx::fence_proxy_async();
    await_scorers();
  }

  /// Rewrites a row of q and of qv: as float16, each two columns where operands of keys have them. Of 64 columns lane t
  /// of a quad has 16 side by side of a key, four in each step of a product.
  __device__ void prepare_queries(TilePlace tile, int row) {
    constexpr int chunks = variant.q_chunks();
    constexpr int chunks_of_q = chunks_of(variant.head_dim);
    const unsigned lane = thread_of_warpgroup() % 32;
    unsigned char* const queries = shared_.q_tiles[queries_of(tile).stage()].rows;
    const auto word_at = [&](int chunk, unsigned word) {
      return reinterpret_cast<unsigned*>(queries + byte_offset<rows>(row, chunk * chunk_row_bytes + 4 * word));
    };
    unsigned words[chunks];
    if constexpr (variant.widens_queries()) {
      const TileWork& work = work_of(tile);
      const RowPlace place = place_of(a_, work, row);
      const Problem& p = a_.problem;
      const int slot = p.query_slot(work.sequence);
      const long long row_of_q = row_in_tensor(work, place);
      const auto* const q = p.q.at<const unsigned char>(slot, row_of_q, place.head);
      const auto* const qv = variant.qv ? p.qv.at<const unsigned char>(slot, row_of_q, place.head) : nullptr;
#pragma unroll
      for (int i = 0; i < chunks; ++i) {
        const bool of_q = i < chunks_of_q;
        const int column = chunk_columns * (of_q ? i : i - chunks_of_q) + 2 * static_cast<int>(lane);
        const int left = place.query < work.used ? (of_q ? p.head_dim : p.head_dim_v) - column : 0;
        const unsigned char* const pair = (of_q ? q : qv) + column;
        unsigned bits = 0;
        if (left > 0) bits = pair[0];
        if (left > 1) bits |= static_cast<unsigned>(pair[1]) << 8;
        words[i] = widen_e4m3(static_cast<unsigned short>(bits));
      }
    } else {
#pragma unroll
      for (int i = 0; i < chunks; ++i) words[i] = *word_at(i, lane);
    }
    if constexpr (variant.fits_queries()) {
      const float power_of_q = power_of_two(exponent_of_q(tile));
      const auto power = [&](int chunk) { return chunk < chunks_of_q ? power_of_q : 1; };
      float largest = 0;
#pragma unroll
      for (int i = 0; i < chunks; ++i) {
        const float2 pair = unpack<variant.types.query>(words[i]);
        largest = fmaxf(largest, fmaxf(fabsf(pair.x), fabsf(pair.y)) * power(i));
      }
      const Float16Fit fit(warp_max(largest));
#pragma unroll
      for (int i = 0; i < chunks; ++i) {
        const float2 pair = unpack<variant.types.query>(words[i]);
        words[i] = fit.round(make_float2(pair.x * power(i), pair.y * power(i)));
      }
      if (lane == 0) shared_.rows.query_factor[row] = fit.divisor();
    }
    __syncwarp();
    const unsigned word = lane % 8 / 2 * 8 + lane % 2 * 4 + lane / 8;
#pragma unroll
    for (int i = 0; i < chunks; ++i) *word_at(i, word) = words[i];
  }

  /// The exponent of what products of q and k are to be multiplied by before those of qv and v are added, if queries
  /// are fitted to float16: both are then fitted together, and q, multiplied by that power of two, is compared with qv
  /// as what it will be.
  __device__ int exponent_of_q(TilePlace tile) const {
    if constexpr (!variant.qv || !variant.fits_queries()) return 0;
    constexpr int least = -60;
    return max(exponent_of(fabsf(scales_of(tile).qk_factor)), least);
  }

  // --- blocks

  __device__ void score_part(TilePlace tile, BlockRange blocks) {
    float row_sums[row_tiles][2] = {};
    const int of_others = (warpgroup() + scorers - next_.template in<scorers>().stage()) % scorers;  // before its first
    next_.advance(of_others);
    int n = blocks.end - 1 - of_others;
#pragma unroll 1
    for (; n >= blocks.begin; n -= scorers) {
      score_block(tile, n, blocks, row_sums);
      next_.advance(scorers);
    }
    next_ = next_.before(blocks.begin - 1 - n);
  }

  /// Scores block n of a part, and makes weights of the scores.
  __device__ void score_block(TilePlace tile, int n, BlockRange blocks, RowSums row_sums) {
    float scores[registers_of_product];
    score(tile, scores);
    if constexpr (variant.fits_queries()) {
      const float* const factors = shared_.rows.query_factor + row_of(thread_of_warpgroup());
#pragma unroll
      for (int r = 0; r < row_tiles; ++r) {
        const float2 factor = pair_at(factors + 8 * r);
#pragma unroll
        for (int i = 0; i < 4; ++i) scores[4 * r + i] *= i % 2 == 0 ? factor.x : factor.y;
      }
    }
    this->modify_scores(scores, tile);
    hide_keys(work_of(tile), n * keys, scores);
    weigh(tile, n, blocks, scores, row_sums);
  }

  /// scores = keys x queries + values x queries of values, of the next block.
  __device__ void score(TilePlace tile, Scores scores) const {
    const unsigned q = query_matrix(tile);
    await(shared_.k, next_);
    multiply<variant.head_dim, true>(shared_.k_tiles[next_.stage()].rows, q, scores);
    release_read<variant>(shared_.k.empty[next_.stage()]);
    if constexpr (variant.qv) {
      // Mostly keys and values have one scale, and products go on.
      const float factor = scales_of(tile).qk_factor * power_of_two(-exponent_of_q(tile));
      if (factor != 1) {
        ptx::wgmma_wait<0>();
        ptx::hold(scores);
#pragma unroll
        for (int i = 0; i < registers_of_product; ++i) scores[i] *= factor;
      }
      constexpr int columns_of_slice = variant.head_dim_v / variant.v_slices();
      constexpr int bytes_of_queries = columns_of_slice / chunk_columns * rows * chunk_row_bytes;
#pragma unroll
      for (int slice = 0; slice < variant.v_slices(); ++slice) {
        await(shared_.v[slice], next_);
        multiply<columns_of_slice, false>(shared_.v_tiles[next_.stage()].rows + slice * columns_of_slice * keys,
                                          ptx::advance(q, variant.qv_offset() + slice * bytes_of_queries), scores);
      }
    }
    ptx::wgmma_wait<0>();
    ptx::hold(scores);
  }

  /// Starts scores = keys x queries, or scores +=, of so many columns.
  template <int columns, bool replaces>
  __device__ static void multiply(const unsigned char* tile, unsigned q, Scores scores) {
    constexpr int groups = columns / chunk_columns;
    const unsigned thread = thread_of_warpgroup();
    const unsigned of_lane =
        piece_offset<keys>(thread / 32 * 16 + key_of(static_cast<int>(thread % 32 / 4)), thread % 4);
    uint4 pieces[2];  // of both keys
    const auto load = [&](int group) {
      // Two groups of 64 columns are a chunk: the pieces of the second are in the other half of a row.
      const unsigned offset = (of_lane ^ group % 2 * 64) + group / 2 * keys * chunk_row_bytes;
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        pieces[i] = *reinterpret_cast<const uint4*>(tile + offset + 8 * i * chunk_row_bytes);
      }
    };
    load(0);
#pragma unroll
    for (int first = 0; first < 4 * groups; first += steps_at_once) {
      const int group = first / 4;
      unsigned a[steps_at_once][4];
#pragma unroll
      for (int step = 0; step < steps_at_once; ++step) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const uint2 halves = widen_word<element>(word_of(pieces[i], first % 4 + step));
          a[step][i] = halves.x;
          a[step][i + 2] = halves.y;
        }
      }
      const bool last_of_group = (first + steps_at_once) % 4 == 0;
      if (last_of_group && group + 1 < groups) load(group + 1);
      ptx::wgmma_fence();
#pragma unroll
      for (int step = 0; step < steps_at_once; ++step) {
        ptx::wgmma<element, rows, 0, true, ptx::Major::k>(
            scores, a[step], ptx::advance(q, group * rows * chunk_row_bytes + 32 * (first % 4 + step)),
            replaces ? first + step > 0 : 1);
      }
      ptx::wgmma_commit();
      ptx::wgmma_wait<1>();
    }
  }

  /// Hides from each row the keys that it does not see, of the block that begins with `first_key`.
  __device__ void hide_keys(const TileWork& work, int first_key, Scores scores) const {
    if (first_key >= work.seen_by_all.begin && first_key + keys <= work.seen_by_all.end) return;
    const unsigned thread = thread_of_warpgroup();
    const int key = first_key + static_cast<int>(thread / 32) * 16 + key_of(static_cast<int>(thread % 32 / 4));
    const KeyRange* const of_lane = shared_.rows.visible + row_of(thread);
#pragma unroll
    for (int r = 0; r < row_tiles; ++r) {
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        const KeyRange visible = of_lane[8 * r + c];
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          if (key + 8 * i < visible.begin || key + 8 * i >= visible.end) scores[4 * r + 2 * i + c] = -infinity();
        }
      }
    }
  }

  // --- weights

  /// Makes weights of the scores of block n of a part, and puts them in shared memory.
  __device__ void weigh(TilePlace tile, int n, BlockRange blocks, Scores scores, RowSums row_sums) {
    const float scale = scales_of(tile).exponent_scale;
    const auto place = next_.template in<variant.p_tiles()>();
    auto& largest = largest_of_own_warps();
    store_largest(scores, largest);
    await_own_warps();
    find_references(n, blocks, place, scale, largest);
    __syncwarp();
    const unsigned thread = thread_of_warpgroup();
    const float2* const relative = shared_.rows.relative[4 * warpgroup() + thread / 32] + row_of(thread);
#pragma unroll
    for (int r = 0; r < row_tiles; ++r) {
      const float4 both = *reinterpret_cast<const float4*>(relative + 8 * r);
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        const float subtrahend = c == 0 ? both.x : both.z;
        float sum = 0;
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          float& score = scores[4 * r + 2 * i + c];
          score = exp2_approximately(fmaf(score, scale, -subtrahend));
          sum += score;
        }
        row_sums[r][c] = fmaf(row_sums[r][c], c == 0 ? both.y : both.w, sum);
      }
    }
    store_weights(place.stage(), scores);
    if (n < blocks.begin + scorers) store_sums(place.stage(), row_sums);
    shared_.rows.weights.full[place.stage()].arrive();
  }

  /// The largest scores of the next block's rows, of this scorer's warps. Those of its last block may be read yet.
  using Largest = float (&)[4][rows];
  __device__ Largest largest_of_own_warps() const {
    return shared_.rows.largest[next_.template in<2 * scorers>().stage() / scorers][warpgroup()];
  }

  /// Puts the largest of each row's scores of this warp where those of the other warps are. Lanes that hold the same
  /// rows share them out: each half of them looks for the largest of half of the rows, and so on.
  __device__ static void store_largest(const float (&scores)[registers_of_product], Largest of_warps) {
    const unsigned thread = thread_of_warpgroup();
    const auto of_lane = [&](int i) { return fmaxf(scores[4 * (i / 2) + i % 2], scores[4 * (i / 2) + i % 2 + 2]); };
    const auto exchange = [&](float kept, float given, int distance) {
      return fmaxf(kept, __shfl_xor_sync(~0U, given, distance));
    };
    float largest[row_tiles];
    bool upper = (thread & 16) != 0;
#pragma unroll
    for (int i = 0; i < row_tiles; ++i) {
      const float lower_half = of_lane(i);
      const float upper_half = of_lane(i + row_tiles);
      largest[i] = exchange(upper ? upper_half : lower_half, upper ? lower_half : upper_half, 16);
    }
    int first = upper ? row_tiles : 0;  // of those that this lane has come to look for
#pragma unroll
    for (int distance = 8, count = row_tiles / 2; distance >= 4; distance /= 2, count /= 2) {
      upper = (thread & distance) != 0;
      if (count == 0) {
        largest[0] = exchange(largest[0], largest[0], distance);
        continue;
      }
#pragma unroll
      for (int i = 0; i < count; ++i) {
        largest[i] =
            exchange(upper ? largest[i + count] : largest[i], upper ? largest[i] : largest[i + count], distance);
      }
      if (upper) first += count;
    }
    float* const of_warp = of_warps[thread / 32] + row_of(thread);
#pragma unroll
    for (int i = 0; i < (row_tiles > 4 ? row_tiles / 4 : 1); ++i) {
      of_warp[(first + i) / 2 * 8 + (first + i) % 2] = largest[i];
    }
  }

  /// Finds what weights of rows are relative to from block n of a part on, their largest scores so far, and what
  /// follows from that: each warp for itself, which takes less time than to wait for another.
  __device__ void find_references(int n, BlockRange blocks, WeightsPlace place, float scale, Largest of_warps) const {
    const WeightsPlace before = place.before(1);
    const bool is_first = n == blocks.end - 1;
    auto& of_rows = shared_.rows;
    // Be it of another part: whose turn it is nobody overtakes.
    if (scorers > 1) of_rows.weights.full[before.stage()].wait(before.parity());
    of_rows.weights.empty[place.stage()].wait(place.parity() ^ 1);
    const unsigned thread = thread_of_warpgroup();
#pragma unroll
    for (unsigned row = thread % 32; row < rows; row += 32) {
      const float reference_before = is_first ? -infinity() : of_rows.references[before.stage()][row];
      float reference = reference_before;
#pragma unroll
      for (const auto& of_warp : of_warps) reference = fmaxf(reference, of_warp[row]);
      const bool rises = reference > reference_before;
      const float factor = rises ? exp2_approximately((reference_before - reference) * scale) : 1;
      // This scorer's own sums are without the other's block before.
      const bool skips = scorers > 1 && n < blocks.end - 2;
      of_rows.relative[4 * warpgroup() + thread / 32][row] =
          make_float2(reference == -infinity() ? 0 : reference * scale,
                      skips ? factor * of_rows.factors[before.stage()][row] : factor);
      if (thread >= 32) continue;
      of_rows.references[place.stage()][row] = reference;
      of_rows.factors[place.stage()][row] = factor;
    }
  }

  /// Puts this warp's sums of weights of a part beside those of its last block.
  __device__ void store_sums(int stage, const float (&row_sums)[row_tiles][2]) const {
    const unsigned thread = thread_of_warpgroup();
    float* const of_lane = shared_.rows.sums[stage][thread / 32] + row_of(thread);
#pragma unroll
    for (int r = 0; r < row_tiles; ++r) {
      const float2 sum = make_float2(EveryFourth::sum(row_sums[r][0]), EveryFourth::sum(row_sums[r][1]));
      if (thread % 32 < 4) pair_at(of_lane + 8 * r) = sum;
      ptx::forget_shared_memory();
    }
  }

  /// Puts weights where products take them: a row of 64 keys for each query row.
  __device__ void store_weights(int stage, const float (&weights)[registers_of_product]) const {
    const unsigned thread = thread_of_warpgroup();
    const unsigned tile = ptx::shared_address(&shared_.weights.tiles[stage]) +
                          piece_offset<rows>(thread % 32 / 16 * 8 + thread % 8, thread / 32 * 2 + thread / 8 % 2);
#pragma unroll
    for (int r = 0; r < row_tiles; r += 2) {
      unsigned words[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) words[i] = pack<element>(weights[4 * r + 2 * i], weights[4 * r + 2 * i + 1]);
      ptx::store_matrices_transposed(tile + 8 * r * chunk_row_bytes, words);
    }
    ptx::fence_proxy_async();
  }
};

template <ForwardVariant variant>
class Adder : TransposedConsumer<variant> {
 public:
  using TransposedConsumer<variant>::TransposedConsumer;

  __device__ void run() {
    for (TilePlace tile; find_tile(tile); tile.advance()) {
      this->for_each_part(tile, [&](BlockRange blocks) { add_part(tile, blocks); });
      release_tile(tile);
    }
  }

 private:
  using Base = TransposedConsumer<variant>;
  using Base::a_;
  using Base::await;
  using Base::element;
  using Base::find_tile;
  using Base::keys;
  using Base::next_;
  using Base::pair_at;
  using Base::registers_of_product;
  using Base::release_tile;
  using Base::row_of;
  using Base::row_tiles;
  using Base::rows;
  using Base::scales_of;
  using Base::shared_;
  using Base::thread_of_warpgroup;
  using Base::warpgroup;
  using Base::work_of;
  using typename Base::TilePlace;

  /// Products of 64 columns of values, a quarter of them by each warp.
  static constexpr int products = variant.consumer_columns() / 64;
  /// Those whose operands are widened together, as registers allow.
  static constexpr int products_at_once = rows <= 16 ? products : 2;
  /// Of a key's values, that a lane takes: a warp has those of 8 lanes.
  static constexpr int value_columns = 2 * products;
  /// Row i of a product is column lane_column() + 2 * product + i.
  using Sums = float (&)[products * registers_of_product];

  /// Number `columns()`, of those that each have some of the values' columns.
  __device__ static int columns() { return warpgroup() - variant.scorers(); }
  __device__ ResultWriter<variant> results() const { return {a_, columns(), shared_}; }

  __device__ static int warp() { return static_cast<int>(thread_of_warpgroup() / 32); }
  __device__ int lane_column() const {
    return results().first_column() + static_cast<int>(thread_of_warpgroup() / 4) * value_columns;
  }

  __device__ void add_part(TilePlace tile, BlockRange blocks) {
    float sums[products * registers_of_product] = {};
    PartWeight weight{-infinity(), 0};  // of this thread's row
#pragma unroll 1
    for (int n = blocks.end - 1; n >= blocks.begin; --n) {
      const auto place = next_.template in<variant.p_tiles()>();
      shared_.rows.weights.full[place.stage()].wait(place.parity());
      rescale(shared_.rows.factors[place.stage()], sums);
      await(values(), next_);
      clear_values(work_of(tile), n * keys);
      add_values(ptx::matrix_at(ptx::shared_address(&shared_.weights.tiles[place.stage()])), sums);
      const auto weights = place.again();  // found anew: it is not worth a register meanwhile
      if (n < blocks.begin + variant.scorers()) add_weights(tile, weights.stage(), weight);
      shared_.rows.weights.empty[weights.stage()].arrive();
      next_.advance();
    }
    results().template write_transposed<value_columns>(
        work_of(tile), blocks.begin, this->value_factor(tile), shared_.rows.targets, weight, lane_column(),
        [&](int row_tile, int i, int j) {
          const float* const first = sums + 2 * j * registers_of_product + 4 * row_tile + i;
          const float* const second = first + registers_of_product;
          return make_float4(first[0], first[2], second[0], second[2]);
        });
  }

  __device__ static void rescale(const float* factors, Sums sums) {
    const float* const of_lane = factors + row_of(thread_of_warpgroup());
#pragma unroll
    for (int r = 0; r < row_tiles; ++r) {
      const float2 factor = pair_at(of_lane + 8 * r);
      if (!__any_sync(~0U, factor.x != 1 || factor.y != 1)) continue;
#pragma unroll
      for (int product = 0; product < products; ++product) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          sums[product * registers_of_product + 4 * r + i] *= i % 2 == 0 ? factor.x : factor.y;
        }
      }
    }
  }

  /// The ring of this adder's columns of values.
  __device__ RingBarriers<variant.stages>& values() const { return shared_.v[variant.v_slices() > 1 ? columns() : 0]; }
  __device__ unsigned char* values_of_block() const { return shared_.v_tiles[next_.stage()].rows; }

  /// Clears what no row sees of this warp's columns of the next block, which begins with `first_key`: scorers, which
  /// read it too, have done with it.
  __device__ void clear_values(const TileWork& work, int first_key) const {
    if (first_key >= work.seen.begin && first_key + keys <= work.seen.end) return;
    constexpr int columns_of_warp = 8 * value_columns;
    const int first_piece = (results().first_column() + warp() * columns_of_warp) / 16;
    clear_unseen(values_of_block(), columns_of_warp / 16, work.seen, first_key, keys,
                 [&](int row, int piece) { return piece_offset<keys>(row, first_piece + piece); });
    if constexpr (!variant.gather) ptx::fence_proxy_async();  // the copy engine will write there
    __syncwarp();
  }

  /// sums += values of the next block, transposed, x weights.
  __device__ void add_values(unsigned weights, Sums sums) {
    using Piece = typename PieceOf<value_columns>::Type;
    constexpr int steps = keys / 16;
    const unsigned char* const tile = values_of_block();
    const int column = lane_column();
    unsigned offsets[2];  // of a key of eight, and the next
#pragma unroll
    for (int i = 0; i < 2; ++i) offsets[i] = byte_offset<keys>(key_of_values(i), column);
    Piece of_keys[4];
    const auto load = [&](int step) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        // Eight rows further on the swizzle is the same.
        const int further = (16 * step + i / 2 * 8) * chunk_row_bytes;
        of_keys[i] = *reinterpret_cast<const Piece*>(tile + offsets[i % 2] + further);
      }
    };
    load(0);
#pragma unroll
    for (int step = 0; step < steps; ++step) {
      const unsigned weights_of_step = ptx::advance(weights, 32 * step);
      multiply<0>(of_keys, weights_of_step, sums, [&] {
        if (step + 1 < steps) load(step + 1);
      });
    }
    release_read<variant>(values().empty[next_.stage()]);
    ptx::wgmma_wait<0>();
    ptx::hold(sums);
  }

  /// Starts to add products from number `first` on, of a step of 16 keys. `load_next` is called when all have been
  /// widened.
  template <int first, typename Piece, typename LoadNext>
  __device__ static void multiply(const Piece (&of_keys)[4], unsigned weights, Sums sums, const LoadNext& load_next) {
    unsigned a[products_at_once][4];
    widen_values<element, first / 2, products_at_once / 2>(of_keys, a);
    if constexpr (first + products_at_once == products) load_next();
    ptx::wgmma_fence();
    start_products<first, 0>(a, weights, sums);
    ptx::wgmma_commit();
    // Until these are done their operands take registers, which sums of 64 rows do not leave.
    ptx::wgmma_wait<rows <= 32 ? 1 : 0>();
    if constexpr (first + products_at_once < products) {
      multiply<first + products_at_once>(of_keys, weights, sums, load_next);
    }
  }

  template <int first, int product>
  __device__ static void start_products(const unsigned (&a)[products_at_once][4], unsigned weights, Sums sums) {
    ptx::wgmma<element, rows, (first + product) * registers_of_product, false, ptx::Major::k>(sums, a[product],
                                                                                              weights);
    if constexpr (product + 1 < products_at_once) start_products<first, product + 1>(a, weights, sums);
  }

  /// Adds what a scorer's last block says of the weights of this thread's row, if it has one.
  __device__ void add_weights(TilePlace tile, int stage, PartWeight& weight) const {
    const int row = results().thread();
    if (row >= rows) return;
    const auto& of_rows = shared_.rows;
    const float reference = of_rows.references[stage][row];
    if (reference != -infinity()) weight.max = reference * scales_of(tile).exponent_scale;
    weight.sum *= of_rows.factors[stage][row];
#pragma unroll
    for (const auto& of_warp : of_rows.sums[stage]) weight.sum += of_warp[row];
  }
};

template <ForwardVariant variant>
__device__ __forceinline__ void transposed(const ForwardArguments& a) {
  run<variant, Scorer<variant>, Adder<variant>>(a);
}

}  // namespace mate::cuda
