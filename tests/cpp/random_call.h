// Random calls of attention(): every mode, type, mask and option that the contract permits, together.
#pragma once

#include <mate/attention.h>

#include <algorithm>
#include <climits>
#include <cmath>
#include <cstdint>
#include <numeric>
#include <vector>

#include "memory.h"
#include "random.h"
#include "reference.h"

namespace mate::testing {

/// The call of one seed. Whatever must not reach its results is NaN: keys that no row sees, rows past a
/// length, gaps between rows; page table entries that must not be looked at are garbage.
class RandomCall {
 public:
  Memory memory;
  AttentionArguments arguments;

  enum class Kind {
    any,
    mixed,      ///< a prompt, and sequences of a few queries at most, over pages that have room for far more keys
    plain,      ///< nothing rare, for which a GPU has other kernels: see is_plain in forward_arguments.h
    prompts,    ///< of so many rows that clusters of a GPU's multiprocessors may have them together, many of them plain
    few_tiles,  ///< of so many keys that such a cluster may share out those of each, many of them plain
    wide        ///< as prompts, of wide heads or with qv; or of few queries whose many heads share a key head, which
                ///< such a cluster has together
  };

  explicit RandomCall(std::uint64_t seed, Kind kind = Kind::any)
      : random_(seed),
        mixed_(kind == Kind::mixed),
        plain_(kind == Kind::plain),
        prompts_(kind == Kind::prompts),
        few_tiles_(kind == Kind::few_tiles),
        wide_(kind == Kind::wide) {
    draw_sizes();
    draw_scores();
    draw_queries();
    draw_keys();
    draw_context_parallel();
    draw_work();
    draw_values();
  }

 private:
  using Integers = std::vector<std::int64_t>;
  enum class Storage { normal, ragged, paged };

  bool rarely(double probability) { return !plain_ && random_.chance(probability); }
  /// Whether clusters are to serve the call if they can: its rows are aligned, and nothing else decides how.
  bool for_clusters() const { return prompts_ || few_tiles_ || wide_; }

  void draw_sizes() {
    batch_ = mixed_ ? random_.integer(3, 5) : random_.chance(0.05) ? 0 : random_.integer(1, 4);
    heads_k_ = random_.integer(1, 3);
    group_ = random_.one_of<std::int64_t>({1, 1, 2, 3, 5});
    long_keys_ = random_.chance(0.3);
    const bool large_head = !long_keys_ && random_.chance(0.1);
    d_ = draw_head_size(large_head);
    dv_ = random_.chance(0.5) ? d_ : draw_head_size(large_head);
    most_q_ = large_head || long_keys_ ? 3 : random_.one_of<std::int64_t>({1, 4, 30});
    if (mixed_) most_q_ = 30;
    most_k_ = long_keys_ ? 400 : 30;

    const DLDataType narrow = random_.chance(0.5) ? bfloat16 : float16;
    if (prompts_) {
      draw_prompts(narrow);
      return;
    }
    if (few_tiles_) {
      draw_few_tiles(narrow);
      return;
    }
    if (wide_) {
      draw_wide(narrow);
      return;
    }
    q_type_ = random_.one_of<DLDataType>({float32, float16, bfloat16, float8_e4m3fn, narrow});
    const bool quantised_cache = q_type_ == narrow && random_.chance(0.4);
    k_type_ = quantised_cache ? float8_e4m3fn : q_type_;
    out_type_ = q_type_ == float8_e4m3fn ? narrow : q_type_;
  }

  void draw_prompts(DLDataType type) {
    plain_ = random_.chance(0.5);
    batch_ = random_.integer(1, 2);
    heads_k_ = random_.integer(1, 2);
    group_ = random_.one_of<std::int64_t>({1, 2, 2, 4});
    d_ = random_.one_of<std::int64_t>({72, 96, 128, 192, 256, 320});
    dv_ = random_.chance(0.7) ? d_ : random_.one_of<std::int64_t>({40, 128});
    // Mostly of tiles that clusters share evenly, whether heads share them too or not.
    least_q_ = random_.chance(0.7) ? 193 : 129;
    most_q_ = least_q_ == 193 ? 256 : 400;
    most_k_ = 500;
    q_type_ = k_type_ = random_.chance(0.3) ? float8_e4m3fn : type;
    out_type_ = type;
  }

  void draw_few_tiles(DLDataType type) {
    plain_ = random_.chance(0.5);
    batch_ = random_.chance(0.8) ? 1 : 2;
    heads_k_ = 1;
    group_ = random_.one_of<std::int64_t>({1, 2, 4});
    d_ = random_.one_of<std::int64_t>({16, 64, 72, 128, 256});
    dv_ = random_.chance(0.7) ? d_ : random_.one_of<std::int64_t>({40, 64, 128});
    least_q_ = 17;
    most_q_ = random_.one_of<std::int64_t>({30, 64, 140});
    least_k_ = 200;
    most_k_ = 1500;
    q_type_ = random_.chance(0.2) ? float8_e4m3fn : type;
    k_type_ = random_.chance(0.2) ? float8_e4m3fn : q_type_;
    out_type_ = type;
  }

  void draw_wide(DLDataType type) {
    plain_ = random_.chance(0.5);
    batch_ = random_.integer(1, 3);
    heads_k_ = 1;
    d_ = random_.one_of<std::int64_t>({64, 320, 512});
    dv_ = random_.one_of<std::int64_t>({64, 128, 320, 512});
    with_qv_ = std::max(d_, dv_) <= 128 || random_.chance(0.5);
    if (random_.chance(0.6)) {
      group_ = random_.one_of<std::int64_t>({66, 128});
      most_q_ = 2;
      most_k_ = 700;
    } else {
      group_ = random_.one_of<std::int64_t>({1, 2});
      least_q_ = 65;
      most_q_ = 128;
      most_k_ = 200;
    }
    q_type_ = k_type_ = out_type_ = type;
  }

  /// Half of them are multiples of 8, or of 64 where they are large: the copy engine takes those, others are gathered.
  std::int64_t draw_head_size(bool large) {
    const std::int64_t most = large ? 512 : 40;
    const std::int64_t step = large ? 64 : 8;
    return plain_ || random_.chance(0.5) ? step * random_.integer(1, most / step) : random_.integer(1, most);
  }

  void draw_scores() {
    AttentionArguments& a = arguments;
    a.causal = random_.chance(0.4);
    const Integers bounds{-1, 0, 1, 3, 20, 70, 1'000'000'000'000};
    if (random_.chance(0.3)) a.window_left = random_.one_of(bounds);
    if (random_.chance(0.3)) a.window_right = random_.one_of(bounds);
    if (rarely(0.2)) a.attention_chunk = random_.one_of<std::int64_t>({-1, 1, 3, 17, 64, 100});
    if (random_.chance(0.3)) a.softcap = random_.uniform(0.5, 30);
    if (random_.chance(0.4)) {
      const double standard = 1 / std::sqrt(static_cast<double>(d_));
      a.softmax_scale = random_.chance(0.2) ? 0 : standard * random_.uniform(0.5, 2) * (random_.chance(0.1) ? -1 : 1);
    }
    if (rarely(0.3)) {
      const DLDataType type = random_.one_of<DLDataType>({float32, float16, bfloat16});
      a.learnable_sink = memory.tensor(type, {heads_q()}, {random_.one_of<std::int64_t>({1, 1, 3, -2})});
      fill(a.learnable_sink, [&] { return random_.uniform(-3, 3); });
    }
    // Scales are ignored unless the tensors are e4m3.
    for (Tensor* descale : {&a.q_descale, &a.k_descale, &a.v_descale}) {
      if (!random_.chance(0.5)) continue;
      *descale =
          memory.tensor(float32, {batch_, heads_k_}, random_.one_of<Integers>({{heads_k_, 1}, {0, 0}, {1, 7}, {0, 1}}));
      fill(*descale, [&] { return random_.uniform(0.25, 2); });
    }
  }

  void draw_queries() {
    AttentionArguments& a = arguments;
    const bool ragged = mixed_ || random_.chance(0.4);
    std::int64_t rows = random_.integer(least_q_, most_q_);
    Integers lengths(batch_, rows);
    if (ragged) {
      lengths = draw_lengths(mixed_ ? random_.integer(1, 3) : most_q_);
      if (mixed_) lengths[random_.integer(0, batch_ - 1)] = most_q_;
      a.cu_seqlens_q = integers(offsets_of(lengths, rows));
      a.q = tensor(q_type_, {rows, heads_q(), d_});
    } else {
      a.q = tensor(q_type_, {batch_, rows, heads_q(), d_});
    }
    if (!mixed_ && rarely(0.3)) {
      for (std::int64_t& length : lengths) length = random_.integer(0, length);
      a.seqused_q = integers(lengths);
    }
    if (ragged || random_.chance(0.2)) a.max_seqlen_q = longest(lengths) + random_.integer(0, 2);
    std::vector<std::int64_t> shape(a.q.shape(), a.q.shape() + a.q.ndim());
    shape.back() = dv_;
    if (with_qv_ || (!for_clusters() && random_.chance(0.25))) a.qv = tensor(q_type_, shape);
    a.out = tensor(out_type_, shape);
    if (rarely(0.8)) {
      a.lse = ragged ? tensor_of_any_order(float32, {heads_q(), rows})
                     : tensor_of_any_order(float32, {batch_, heads_q(), rows});
    }
  }

  void draw_keys() {
    AttentionArguments& a = arguments;
    const auto storage = mixed_ ? Storage::paged : static_cast<Storage>(random_.integer(0, 2));
    const bool appends = storage != Storage::ragged && random_.chance(0.4);
    const std::int64_t page_size =
        for_clusters() ? random_.one_of<std::int64_t>({16, 64}) : random_.one_of<std::int64_t>({1, 2, 3, 16, 64, 100});

    Integers capacity =
        storage == Storage::ragged ? draw_lengths(most_k_) : Integers(batch_, random_.integer(least_k_, most_k_));
    if (storage == Storage::paged)
      capacity.assign(batch_, (random_.integer(least_k_, most_k_) + page_size - 1) / page_size * page_size);
    used_ = capacity;
    if (mixed_ || appends || random_.chance(0.5)) {
      for (std::int64_t& used : used_) used = random_.integer(random_.chance(0.5) ? used / 2 : 0, used);
      a.seqused_k = integers(used_);
    }
    Integers leftpad(batch_, 0);
    if (storage != Storage::ragged && rarely(0.3)) {
      for (std::int64_t b = 0; b < batch_; ++b) leftpad[b] = random_.integer(0, used_[b]);
      a.cache_leftpad = integers(leftpad);
    }
    Integers appended(batch_, 0);
    if (appends) appended = draw_new_keys(capacity);
    if (storage == Storage::ragged || random_.chance(0.2)) {
      a.max_seqlen_k = random_.integer(0, 2);
      for (std::int64_t b = 0; b < batch_; ++b) {
        *a.max_seqlen_k = std::max(*a.max_seqlen_k, used_[b] - leftpad[b] + appended[b]);
      }
    }

    if (storage == Storage::ragged) {
      std::int64_t rows = 0;
      a.cu_seqlens_k = integers(offsets_of(capacity, rows));
      set_cache({rows, heads_k_});
      return;
    }
    // Rows of the cache, or of the page table: in order, or any of more.
    Integers cache_rows(batch_);
    std::iota(cache_rows.begin(), cache_rows.end(), 0);
    std::int64_t rows = batch_;
    if (rarely(0.3)) {
      rows += random_.integer(0, 3);
      cache_rows.resize(rows);
      std::iota(cache_rows.begin(), cache_rows.end(), 0);
      random_.shuffle(cache_rows);
      cache_rows.resize(batch_);
      a.cache_batch_idx = integers(cache_rows);
    }
    if (storage == Storage::normal) {
      set_cache({rows, batch_ == 0 ? 5 : capacity[0], heads_k_});
      return;
    }
    const std::int64_t needed_pages = batch_ == 0 ? 2 : capacity[0] / page_size;
    const std::int64_t max_pages = needed_pages + (mixed_ ? 2000 / page_size : 0);
    const std::int64_t pages = batch_ * needed_pages + random_.integer(1, 3);
    set_cache({pages, page_size, heads_k_});
    Integers free(pages);
    std::iota(free.begin(), free.end(), 0);
    random_.shuffle(free);
    a.page_table = memory.tensor(int32, {rows, max_pages}, {max_pages + random_.integer(0, 2), 1});
    fill(a.page_table, [&] { return static_cast<double>(random_.one_of<int>({INT_MIN, -1, 1'000'000, INT_MAX})); });
    const bool shares_prefix = random_.chance(0.3);
    for (std::int64_t b = 0; b < batch_; ++b) {
      const std::int64_t end = used_[b] + appended[b];
      for (std::int64_t page = leftpad[b] / page_size; page * page_size < end && leftpad[b] < end; ++page) {
        // Pages that the first sequence has filled, and this one too, so that neither appends to them.
        const bool shared =
            shares_prefix && page >= leftpad[0] / page_size && (page + 1) * page_size <= std::min(used_[0], used_[b]);
        if (shared && b > 0) {
          write(a.page_table, read(a.page_table, cache_rows[0], page), cache_rows[b], page);
        } else {
          write(a.page_table, static_cast<double>(free.back()), cache_rows[b], page);
          free.pop_back();
        }
      }
    }
  }

  /// How many keys each sequence appends. Draws their tensors and the rotation.
  Integers draw_new_keys(const Integers& capacity) {
    AttentionArguments& a = arguments;
    Integers appended(batch_, 0);
    const DLDataType type = random_.chance(0.5) ? q_type_ : k_type_;
    const bool packed = random_.chance(0.4);
    std::int64_t rows = random_.integer(0, 5);
    for (std::int64_t b = 0; b < batch_; ++b) {
      const std::int64_t room = capacity[b] - used_[b];
      appended[b] = random_.integer(0, std::min<std::int64_t>(room, 5));
      rows = std::min(rows, room);
    }
    if (packed) {
      a.cu_seqlens_k_new = integers(offsets_of(appended, rows));
      a.k_new = tensor(type, {rows, heads_k_, d_});
      a.v_new = tensor(type, {rows, heads_k_, dv_});
    } else {
      appended.assign(batch_, rows);
      a.k_new = tensor(type, {batch_, rows, heads_k_, d_});
      a.v_new = tensor(type, {batch_, rows, heads_k_, dv_});
    }
    if (d_ >= 16 && random_.chance(0.7)) draw_rotary();
    return appended;
  }

  void draw_rotary() {
    AttentionArguments& a = arguments;
    const std::int64_t half = 8 * random_.integer(1, d_ / 16);
    // Positions past the end of a short table take its last row.
    const std::int64_t positions = random_.chance(0.2) ? random_.integer(1, 20) : most_k_ + most_q_ + 60;
    const DLDataType type = random_.one_of<DLDataType>({q_type_, float32, float16, bfloat16});
    a.rotary_cos = memory.tensor(type, {positions, half}, {half + random_.integer(0, 3), 1});
    a.rotary_sin = memory.tensor(type, {positions, half}, {half + random_.integer(0, 3), 1});
    for (std::int64_t position = 0; position < positions; ++position) {
      for (std::int64_t i = 0; i < half; ++i) {
        const double angle = static_cast<double>(position) * std::pow(100, -static_cast<double>(i) / half);
        write(a.rotary_cos, std::cos(angle), position, i);
        write(a.rotary_sin, std::sin(angle), position, i);
      }
    }
    a.rotary_interleaved = random_.chance(0.5);
    if (random_.chance(0.3)) a.rotary_seqlens = integers(draw_lengths(50));
  }

  void draw_context_parallel() {
    AttentionArguments& a = arguments;
    if (a.rotary_cos.given() || !rarely(0.25)) return;
    a.cp_world_size = random_.integer(2, 4);
    a.cp_rank = random_.integer(0, a.cp_world_size - 1);
    a.cp_tot_seqused_k = integers(Integers(batch_, 0));
    Integers totals;
    for (const CallSequence& s : sequences_of(a)) {
      // Mostly the rank's exact share, sometimes one that does not fit it.
      const std::int64_t share = s.sk() == 0 ? a.cp_rank : (s.sk() - 1) * a.cp_world_size + a.cp_rank + 1;
      totals.push_back(std::max<std::int64_t>(0, share + (random_.chance(0.2) ? random_.integer(-20, 20) : 0)));
    }
    a.cp_tot_seqused_k = integers(totals);
  }

  void draw_work() {
    AttentionArguments& a = arguments;
    a.num_splits = mixed_ || plain_ || few_tiles_ ? 0
                   : prompts_                     ? 1
                   : wide_                        ? random_.one_of<std::int64_t>({0, 0, 1, 3})
                                                  : random_.one_of<std::int64_t>({-1, 0, 1, 2, 3, 7, 256});
    if (random_.chance(0.5)) a.pack_gqa = random_.chance(0.5);
    // Of the emulated GPU's twelve multiprocessors, so that those which are left have many tiles each.
    a.sm_margin = random_.one_of(few_tiles_ ? Integers{0, 0, 0, 6}
                                 : prompts_ ? Integers{0, 0, 8, 10}
                                            : Integers{0, 0, 8, 1000});
    a.batch_invariant = !mixed_ && !for_clusters() && rarely(0.2);
    if (random_.chance(0.2)) {
      // As good as stale: a call must end, with the right results, whatever it holds.
      Integers stale(scheduler_metadata_size(batch_));
      for (std::int64_t& element : stale) element = random_.one_of<std::int64_t>({INT_MIN, 0, 1, 2, 5, 300, INT_MAX});
      a.scheduler_metadata = integers(stale);
    }
  }

  void draw_values() {
    const AttentionArguments& a = arguments;
    for (const CallSequence& s : sequences_of(a)) {
      for (std::int64_t i = 0; i < s.sq; ++i) {
        set_rows(a.q, s.slot, s.first_row + i);
        if (a.qv.given()) set_rows(a.qv, s.slot, s.first_row + i);
      }
      for (std::int64_t j = 0; j < s.sk(); ++j) {
        bool seen = false;
        for (std::int64_t i = 0; i < s.sq && !seen; ++i) seen = visible(mask_of(a), i, j, s.sq, s.sk(), s.total);
        if (!seen) continue;
        const std::int64_t t = j - (s.sk() - s.appended);
        if (s.is_new(j)) {
          set_rows(a.k_new, s.new_slot, s.first_new + t);
          set_rows(a.v_new, s.new_slot, s.first_new + t);
        } else {
          set_rows(a.k, s.keys[j].first, s.keys[j].second);
          set_rows(a.v, s.keys[j].first, s.keys[j].second);
        }
      }
    }
  }

  void set_rows(const Tensor& tensor, std::int64_t slot, std::int64_t row) {
    for (std::int64_t head = 0; head < tensor.size(-2); ++head) {
      for (std::int64_t i = 0; i < tensor.size(-1); ++i) {
        write_at(tensor, cell(tensor, slot, row, head, i), random_.normal());
      }
    }
  }

  std::int64_t heads_q() const { return heads_k_ * group_; }
  static std::int64_t longest(const Integers& lengths) {
    return lengths.empty() ? 0 : *std::max_element(lengths.begin(), lengths.end());
  }

  void set_cache(Integers shape) {
    shape.push_back(d_);
    arguments.k = tensor(k_type_, shape);
    shape.back() = dv_;
    arguments.v = tensor(k_type_, shape);
  }

  Integers draw_lengths(std::int64_t most) {
    Integers lengths(batch_);
    for (std::int64_t& length : lengths) length = random_.chance(0.1) ? 0 : random_.integer(0, most);
    return lengths;
  }

  /// Offsets of segments of these lengths, of a tensor with some rows before and after them.
  Integers offsets_of(const Integers& lengths, std::int64_t& rows) {
    Integers offsets{random_.chance(0.2) ? random_.integer(1, 3) : 0};
    for (const std::int64_t length : lengths) offsets.push_back(offsets.back() + length);
    rows = offsets.back() + (random_.chance(0.2) ? random_.integer(1, 3) : 0);
    return offsets;
  }

  Tensor integers(const Integers& values) {
    const Tensor tensor = memory.tensor(int32, {static_cast<std::int64_t>(values.size())},
                                        {random_.one_of<std::int64_t>({1, 1, 1, 2, -1})});
    for (std::size_t i = 0; i < values.size(); ++i) write(tensor, static_cast<double>(values[i]), i);
    return tensor;
  }

  /// A tensor of any strides with a contiguous last dimension.
  Tensor tensor(DLDataType dtype, const Integers& shape) {
    Integers strides(shape.size(), 1);
    if (shape.back() == 1 && random_.chance(0.3)) strides.back() = random_.integer(0, 9);
    draw_strides(shape, strides, shape.size() - 1, shape.back());
    return memory.tensor(dtype, shape, strides);
  }

  Tensor tensor_of_any_order(DLDataType dtype, const Integers& shape) {
    Integers strides(shape.size(), 1);
    draw_strides(shape, strides, shape.size(), 1);
    return memory.tensor(dtype, shape, strides);
  }

  /// Draws the strides of the first `count` dimensions, the innermost of them at least `stride`.
  void draw_strides(const Integers& shape, Integers& strides, std::size_t count, std::int64_t stride) {
    std::vector<std::size_t> order(count);  // outermost last
    for (std::size_t i = 0; i < count; ++i) order[i] = count - 1 - i;
    if (random_.chance(0.4)) random_.shuffle(order);
    for (const std::size_t dimension : order) {
      if (random_.chance(0.2)) stride += random_.integer(1, 5) * (plain_ || for_clusters() ? 16 : 1);  // aligned
      strides[dimension] = !for_clusters() && random_.chance(0.05) ? -stride : stride;
      stride *= std::max<std::int64_t>(shape[dimension], 1);
    }
  }

  Random random_;
  bool mixed_;
  bool plain_;
  bool prompts_;
  bool few_tiles_;
  bool wide_;
  bool with_qv_ = false;
  std::int64_t batch_ = 0, heads_k_ = 1, group_ = 1, d_ = 1, dv_ = 1, least_q_ = 0, most_q_ = 1, least_k_ = 0,
               most_k_ = 1;
  bool long_keys_ = false;
  DLDataType q_type_{}, k_type_{}, out_type_{};
  Integers used_;  ///< keys in use of each sequence
};

}  // namespace mate::testing
