// A sequence of a call, in a call by itself: with batch_invariant its bits are the same.
#pragma once

#include <cstdint>
#include <cstring>
#include <utility>
#include <vector>

#include "memory.h"
#include "random_call.h"

namespace mate::testing {

/// out and lse of the rows of one sequence, bit for bit.
inline std::vector<std::uint32_t> result_bits(const AttentionArguments& a, const CallSequence& s) {
  std::vector<std::uint32_t> bits;
  for (std::int64_t i = s.first_row; i < s.first_row + s.sq; ++i) {
    for (std::int64_t head = 0; head < a.out.size(-2); ++head) {
      for (std::int64_t e = 0; e < a.out.size(-1); ++e) bits.push_back(bits_at(a.out, cell(a.out, s.slot, i, head, e)));
      if (!a.lse.given()) continue;
      bits.push_back(bits_at(a.lse, a.lse.ndim() == 3 ? address(a.lse, s.slot, head, i) : address(a.lse, head, i)));
    }
  }
  return bits;
}

/// The sequence as it is in the call of call_of_one().
inline CallSequence sequence_alone(CallSequence s) {
  s.slot = s.first_row = 0;
  return s;
}

/// A call of the sequence alone, contiguous and with its new keys in place, and with other options that have no say.
inline AttentionArguments call_of_one(Memory& memory, const AttentionArguments& a, const CallSequence& s) {
  AttentionArguments alone = a;
  const std::int64_t heads_q = a.q.size(-2);
  const std::int64_t heads_k = a.k.size(-2);
  const auto copy = [&](const Tensor& from, const Tensor& to, std::int64_t rows, auto place) {
    for (std::int64_t i = 0; i < rows; ++i) {
      for (std::int64_t head = 0; head < from.size(-2); ++head) {
        for (std::int64_t e = 0; e < from.size(-1); ++e) {
          const auto [slot, row] = place(i);
          std::memcpy(cell(to, 0, i, head, e), cell(from, slot, row, head, e), bytes_per_element(from));
        }
      }
    }
    return to;
  };
  const auto query = [&](std::int64_t i) { return std::pair(s.slot, s.first_row + i); };
  const auto key = [&](std::int64_t j) { return s.keys[j]; };
  alone.q = copy(a.q, memory.tensor(a.q.dtype(), {1, s.sq, heads_q, a.q.size(-1)}), s.sq, query);
  if (a.qv.given()) {
    alone.qv = copy(a.qv, memory.tensor(a.qv.dtype(), {1, s.sq, heads_q, a.qv.size(-1)}), s.sq, query);
  }
  alone.k = copy(a.k, memory.tensor(a.k.dtype(), {1, s.sk(), heads_k, a.k.size(-1)}), s.sk(), key);
  alone.v = copy(a.v, memory.tensor(a.v.dtype(), {1, s.sk(), heads_k, a.v.size(-1)}), s.sk(), key);
  alone.out = memory.tensor(a.out.dtype(), {1, s.sq, heads_q, a.out.size(-1)});
  if (a.lse.given()) alone.lse = memory.tensor(float32, {1, heads_q, s.sq});
  for (Tensor* absent : {&alone.cu_seqlens_q, &alone.cu_seqlens_k, &alone.cu_seqlens_k_new, &alone.seqused_q,
                         &alone.seqused_k, &alone.page_table, &alone.cache_batch_idx, &alone.cache_leftpad,
                         &alone.k_new, &alone.v_new, &alone.scheduler_metadata}) {
    *absent = Tensor();
  }
  alone.max_seqlen_q = alone.max_seqlen_k = {};
  for (Tensor* descale : {&alone.q_descale, &alone.k_descale, &alone.v_descale}) {
    if (descale->given()) *descale = view(*descale, address(*descale, s.b), {1, heads_k}, {0, descale->stride(1)});
  }
  if (a.cp_world_size > 1) alone.cp_tot_seqused_k = memory.integers({s.total});
  alone.num_splits = 3;
  alone.sm_margin = 1;
  return alone;
}

}  // namespace mate::testing
