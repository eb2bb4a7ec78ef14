// The judge of calls: attention in float64, plain loops written from the contract, shared with no part of the
// library.
#pragma once

#include <mate/attention.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <sstream>
#include <string>
#include <utility>
#include <vector>

#include "memory.h"
#include "visible.h"

namespace mate::testing {

/// Where a float32 a * cos - b * sin may be rounded: after both products, or after one of them where the
/// other is part of a fused multiply-add. Each is right.
enum class Contraction { none, first_product, second_product };

/// Element of a (slot, row, head, element) tensor, or of a ragged one, which is without slots.
inline std::byte* cell(const Tensor& tensor, std::int64_t slot, std::int64_t row, std::int64_t head, std::int64_t i) {
  return tensor.ndim() == 4 ? address(tensor, slot, row, head, i) : address(tensor, row, head, i);
}

inline MaskArguments mask_of(const AttentionArguments& a) {
  return {a.causal, a.window_left, a.window_right, a.attention_chunk, a.cp_world_size, a.cp_rank};
}

inline double softmax_scale_of(const AttentionArguments& a) {
  if (a.softmax_scale) return *a.softmax_scale;
  return 1 / std::sqrt(static_cast<double>(a.q.size(-1) + (a.qv.given() ? a.v.size(-1) : 0)));
}

/// One sequence of a call.
struct CallSequence {
  std::int64_t b = 0;
  std::int64_t slot = 0;  ///< of q, qv and out
  std::int64_t first_row = 0;
  std::int64_t sq = 0;
  std::vector<std::pair<std::int64_t, std::int64_t>> keys;  ///< slot and row of each key, appended ones included
  std::int64_t appended = 0;                                ///< keys, the last ones, that the call appends
  std::int64_t new_slot = 0;
  std::int64_t first_new = 0;
  std::int64_t total = 0;     ///< keys of all ranks
  std::int64_t position = 0;  ///< rotary position of the first new key

  std::int64_t sk() const { return static_cast<std::int64_t>(keys.size()); }
  bool is_new(std::int64_t j) const { return j >= sk() - appended; }
};

inline std::vector<CallSequence> sequences_of(const AttentionArguments& a) {
  const auto integer = [](const Tensor& tensor, std::int64_t i) { return static_cast<std::int64_t>(read(tensor, i)); };
  const std::int64_t batch = a.cu_seqlens_q.given() ? a.cu_seqlens_q.size(0) - 1 : a.q.size(0);
  std::vector<CallSequence> sequences;
  for (std::int64_t b = 0; b < batch; ++b) {
    CallSequence& s = sequences.emplace_back();
    s.b = b;
    if (a.cu_seqlens_q.given()) {
      s.first_row = integer(a.cu_seqlens_q, b);
      s.sq = integer(a.cu_seqlens_q, b + 1) - s.first_row;
    } else {
      s.slot = b;
      s.sq = a.q.size(1);
    }
    if (a.seqused_q.given()) s.sq = integer(a.seqused_q, b);

    if (a.k_new.given()) {
      if (a.cu_seqlens_k_new.given()) {
        s.first_new = integer(a.cu_seqlens_k_new, b);
        s.appended = integer(a.cu_seqlens_k_new, b + 1) - s.first_new;
      } else {
        s.new_slot = b;
        s.appended = a.k_new.size(1);
      }
    }

    const std::int64_t cache_row = a.cache_batch_idx.given() ? integer(a.cache_batch_idx, b) : b;
    std::int64_t used = 0;
    if (a.seqused_k.given()) {
      used = integer(a.seqused_k, b);
    } else if (a.cu_seqlens_k.given()) {
      used = integer(a.cu_seqlens_k, b + 1) - integer(a.cu_seqlens_k, b);
    } else if (a.page_table.given()) {
      used = a.page_table.size(1) * a.k.size(1);
    } else {
      used = a.k.size(1);
    }
    for (std::int64_t t = a.cache_leftpad.given() ? integer(a.cache_leftpad, b) : 0; t < used + s.appended; ++t) {
      if (a.cu_seqlens_k.given()) {
        s.keys.emplace_back(0, integer(a.cu_seqlens_k, b) + t);
      } else if (a.page_table.given()) {
        const std::int64_t page_size = a.k.size(1);
        s.keys.emplace_back(static_cast<std::int64_t>(read(a.page_table, cache_row, t / page_size)), t % page_size);
      } else {
        s.keys.emplace_back(cache_row, t);
      }
    }
    s.total = a.cp_world_size > 1 ? integer(a.cp_tot_seqused_k, b) : s.sk();
    s.position = a.rotary_seqlens.given() ? integer(a.rotary_seqlens, b) : used;
  }
  return sequences;
}

inline float product_sum(double first, double second, Contraction contraction) {
  // A product of two float32 is exact in float64.
  if (contraction != Contraction::first_product) first = static_cast<float>(first);
  if (contraction != Contraction::second_product) second = static_cast<float>(second);
  return static_cast<float>(first + second);
}

inline void rotate(const AttentionArguments& a, std::vector<double>& row, std::int64_t position,
                   Contraction contraction) {
  const std::int64_t half = a.rotary_cos.size(1);
  const std::int64_t at = std::min(position, a.rotary_cos.size(0) - 1);
  for (std::int64_t i = 0; i < half; ++i) {
    double& x = a.rotary_interleaved ? row[2 * i] : row[i];
    double& y = a.rotary_interleaved ? row[2 * i + 1] : row[half + i];
    const double cos = read(a.rotary_cos, at, i);
    const double sin = read(a.rotary_sin, at, i);
    const double rotated = product_sum(x * cos, -(y * sin), contraction);
    y = product_sum(x * sin, y * cos, contraction);
    x = rotated;
  }
}

inline std::vector<double> read_row(const Tensor& tensor, std::int64_t slot, std::int64_t row, std::int64_t head) {
  std::vector<double> values;
  for (std::int64_t i = 0; i < tensor.size(-1); ++i)
    values.push_back(read_at(tensor, cell(tensor, slot, row, head, i)));
  return values;
}

/// New row t of a sequence, in the cache's type.
inline std::vector<double> appended_row(const AttentionArguments& a, const CallSequence& s, std::int64_t t,
                                        std::int64_t head, bool is_key, Contraction contraction) {
  const Tensor& source = is_key ? a.k_new : a.v_new;
  const Tensor& cache = is_key ? a.k : a.v;
  const Tensor& descale = is_key ? a.k_descale : a.v_descale;
  std::vector<double> row = read_row(source, s.new_slot, s.first_new + t, head);
  if (is_key && a.rotary_cos.given()) rotate(a, row, s.position + t, contraction);
  for (double& x : row) {
    if (!(source.dtype() == cache.dtype()) && descale.given()) x = static_cast<float>(x / read(descale, s.b, head));
    x = rounded(cache.dtype(), x);
  }
  return row;
}

/// What a call must do.
struct Expected {
  struct Written {
    Tensor tensor;
    const std::byte* at;
    double value;
  };

  std::vector<double> out;        ///< (slot, row, head, element)
  std::vector<double> magnitude;  ///< sqrt(sum_j (p_j v_j)**2): how large the terms of out are
  std::vector<double> lse;        ///< (slot, row, head)
  std::vector<Written> appended;
};

inline Expected evaluate(const AttentionArguments& a, Contraction contraction = Contraction::none) {
  constexpr double infinity = std::numeric_limits<double>::infinity();
  const std::int64_t rows = a.q.size(-3);
  const std::int64_t heads = a.q.size(-2);
  const std::int64_t heads_k = a.k.size(-2);
  const std::int64_t dv = a.v.size(-1);
  const std::int64_t all_rows = (a.q.ndim() == 4 ? a.q.size(0) : 1) * rows * heads;
  Expected expected;
  expected.out.assign(all_rows * dv, 0);
  expected.magnitude.assign(all_rows * dv, 0);
  expected.lse.assign(all_rows, -infinity);

  const auto descale_of = [](const Tensor& scaled, const Tensor& descale, std::int64_t b, std::int64_t head_k) {
    return scaled.dtype() == float8_e4m3fn && descale.given() ? read(descale, b, head_k) : 1.0;
  };
  const bool queries_advance = a.causal || a.window_left >= 0 || a.window_right >= 0 || a.attention_chunk > 0;
  for (const CallSequence& s : sequences_of(a)) {
    for (std::int64_t head_k = 0; head_k < heads_k; ++head_k) {
      std::vector<std::vector<double>> k, v;
      for (std::int64_t j = 0; j < s.sk(); ++j) {
        const auto [slot, row] = s.keys[j];
        if (!s.is_new(j)) {
          k.push_back(read_row(a.k, slot, row, head_k));
          v.push_back(read_row(a.v, slot, row, head_k));
          continue;
        }
        const std::int64_t t = j - (s.sk() - s.appended);
        k.push_back(appended_row(a, s, t, head_k, true, contraction));
        v.push_back(appended_row(a, s, t, head_k, false, contraction));
        for (std::size_t i = 0; i < k[j].size(); ++i) {
          expected.appended.push_back({a.k, cell(a.k, slot, row, head_k, i), k[j][i]});
        }
        for (std::size_t i = 0; i < v[j].size(); ++i) {
          expected.appended.push_back({a.v, cell(a.v, slot, row, head_k, i), v[j][i]});
        }
      }
      const double q_descale = descale_of(a.q, a.q_descale, s.b, head_k);
      const double k_descale = descale_of(a.k, a.k_descale, s.b, head_k);
      const double v_descale = descale_of(a.v, a.v_descale, s.b, head_k);
      const std::int64_t group = heads / heads_k;
      for (std::int64_t head = head_k * group; head < (head_k + 1) * group; ++head) {
        for (std::int64_t i = 0; i < s.sq; ++i) {
          std::vector<double> q = read_row(a.q, s.slot, s.first_row + i, head);
          if (a.rotary_cos.given()) {
            rotate(a, q, s.position + (queries_advance ? i : 0), contraction);
            for (double& x : q) x = rounded(a.q.dtype(), x);
          }
          std::vector<double> qv;
          if (a.qv.given()) qv = read_row(a.qv, s.slot, s.first_row + i, head);

          std::vector<std::int64_t> seen;
          std::vector<double> scores;
          double max = -infinity;
          for (std::int64_t j = 0; j < s.sk(); ++j) {
            if (!visible(mask_of(a), i, j, s.sq, s.sk(), s.total)) continue;
            double score = 0;
            for (std::size_t e = 0; e < q.size(); ++e) score += q[e] * q_descale * k[j][e] * k_descale;
            for (std::size_t e = 0; e < qv.size(); ++e) score += qv[e] * q_descale * v[j][e] * v_descale;
            score *= softmax_scale_of(a);
            if (a.softcap > 0) score = a.softcap * std::tanh(score / a.softcap);
            seen.push_back(j);
            scores.push_back(score);
            max = std::max(max, score);
          }
          const double sink = a.learnable_sink.given() ? read(a.learnable_sink, head) : -infinity;
          max = std::max(max, sink);
          double sum = max == -infinity ? 0 : std::exp(sink - max);
          for (const double score : scores) sum += max == -infinity ? 0 : std::exp(score - max);
          const double lse = max + std::log(sum);

          const std::int64_t row = (s.slot * rows + s.first_row + i) * heads + head;
          expected.lse[row] = sum == 0 ? -infinity : lse;
          if (sum == 0) continue;
          for (std::int64_t e = 0; e < dv; ++e) {
            double squares = 0;
            for (std::size_t n = 0; n < seen.size(); ++n) {
              const double term = std::exp(scores[n] - lse) * v[seen[n]][e] * v_descale;
              expected.out[row * dv + e] += term;
              squares += term * term;
            }
            expected.magnitude[row * dv + e] = std::sqrt(squares);
          }
        }
      }
    }
  }
  return expected;
}

/// How far results may be off.
struct Tolerance {
  double out;         ///< RMS error over RMS
  double lse = 2e-5;  ///< absolute, and relative where lse is larger than 1
};

inline Tolerance tolerance_of(const AttentionArguments& a) {
  if (a.out.dtype() == float32) return {2e-6};
  return {a.out.dtype() == float16 ? 5e-4 : 4e-3};
}

inline double root_mean_square(const std::vector<double>& values) {
  double sum = 0;
  for (const double x : values) sum += x * x;
  return values.empty() ? 0 : std::sqrt(sum / static_cast<double>(values.size()));
}

/// What is wrong with the results of a call; empty where nothing is.
inline std::string difference(const AttentionArguments& a, const Expected& expected, const Tolerance& tolerance) {
  std::ostringstream text;
  const std::int64_t slots = a.out.ndim() == 4 ? a.out.size(0) : 1;
  const std::int64_t rows = a.out.size(-3);
  const std::int64_t heads = a.out.size(-2);
  const std::int64_t dv = a.out.size(-1);
  std::vector<double> errors;
  for (std::int64_t slot = 0; slot < slots; ++slot) {
    for (std::int64_t row = 0; row < rows; ++row) {
      for (std::int64_t head = 0; head < heads; ++head) {
        const std::int64_t index = (slot * rows + row) * heads + head;
        const double lse = expected.lse[index];
        if (a.lse.given()) {
          const double got = a.lse.ndim() == 3 ? read(a.lse, slot, head, row) : read(a.lse, head, row);
          if (!(got == lse || std::abs(got - lse) <= tolerance.lse * std::max(1.0, std::abs(lse)))) {
            text << "lse of (" << slot << ", " << row << ", " << head << ") is " << got << ", not " << lse;
            return text.str();
          }
        }
        for (std::int64_t e = 0; e < dv; ++e) {
          const double got = read_at(a.out, cell(a.out, slot, row, head, e));
          const double want = expected.out[index * dv + e];
          if (!(std::isfinite(got) && (std::isfinite(lse) || got == 0))) {
            text << "out of (" << slot << ", " << row << ", " << head << ", " << e << ") is " << got << ", not "
                 << want;
            return text.str();
          }
          errors.push_back(got - want);
        }
      }
    }
  }
  const double scale = std::max(root_mean_square(expected.out), root_mean_square(expected.magnitude));
  if (!(root_mean_square(errors) <= tolerance.out * scale)) {
    text << "out differs by " << root_mean_square(errors) / scale << " (RMS), more than " << tolerance.out;
    return text.str();
  }
  for (const Expected::Written& written : expected.appended) {
    const double got = read_at(written.tensor, written.at);
    if (got != written.value && !(std::isnan(got) && std::isnan(written.value))) {
      text << "an appended element is " << got << ", not " << written.value;
      return text.str();
    }
  }
  return "";
}

/// Makes a call whose tensors all lie in `memory`, and returns what it did wrong: results, or memory that it
/// wrote and must not. Empty where nothing is wrong.
inline std::string judge(Memory& memory, const AttentionArguments& a, const Tolerance& tolerance) {
  std::vector<Expected> versions{evaluate(a)};
  if (a.rotary_cos.given()) {
    versions.push_back(evaluate(a, Contraction::first_product));
    versions.push_back(evaluate(a, Contraction::second_product));
  }
  memory.remember();
  attention(a);
  memory.permit(a.out);
  memory.permit(a.lse);
  for (const Expected::Written& written : versions[0].appended) memory.permit(written.tensor, written.at);
  if (!memory.unchanged()) return "memory outside the results and the appended rows was written";

  std::string first;
  for (const Expected& version : versions) {
    const std::string text = difference(a, version, tolerance);
    if (text.empty()) return text;
    if (first.empty()) first = text;
  }
  return first;
}

inline std::string judge(Memory& memory, const AttentionArguments& a) { return judge(memory, a, tolerance_of(a)); }

}  // namespace mate::testing
