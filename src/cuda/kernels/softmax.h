// The online softmax of the two rows of scores that a thread holds parts of.
#pragma once

#include "accumulator.h"
#include "attention/visibility.h"
#include "ptx/math.h"

namespace mate::cuda {

inline constexpr float log2_of_e = 1.4426950408889634F;
inline constexpr float ln_of_2 = 0.6931471805599453F;

__device__ inline float infinity() { return __int_as_float(0x7f800000); }

using ptx::exp2_approximately;
using ptx::log2_approximately;
using ptx::reciprocal_approximately;

/// tanh, to about 1e-7 of itself near 0 and of 1 elsewhere: tanh.approx is not exact enough for scores.
__device__ inline float tanh_accurately(float x) {
  const float square = x * x;
  float series = fmaf(square, 0.021869488F, -0.053968254F);
  series = fmaf(square, series, 0.13333333F);
  series = fmaf(square, series, -0.33333333F);
  const float near_zero = fmaf(x * square, series, x);
  const float elsewhere = 1 - __fdividef(2, 1 + exp2_approximately(2 * log2_of_e * x));
  // __fdividef of something infinite is NaN from 2^126 on; tanh is 1 long before.
  return fabsf(x) < 0.25F ? near_zero : fabsf(x) > 15 ? copysignf(1, x) : x != x ? x : elsewhere;
}

/// Which keys the scores of a thread are of, two of each row in every `stride` keys: the first, and how far from it the
/// second.
struct ScoreColumns {
  int first = accumulator_column();
  int step = 1;
  int stride = 8;
};

/// Hides the columns of each row of a thread from `end_of_first` or `end_of_second` on.
template <int keys>
__device__ inline void hide_keys_from(float (&scores)[keys / 2], int end_of_first, int end_of_second,
                                      ScoreColumns columns = {}) {
  const int end_of[rows_of_thread] = {end_of_first, end_of_second};
#pragma unroll
  for (int i = 0; i < rows_of_thread; ++i) {
    const int end = end_of[i] - columns.first;
#pragma unroll
    for (int j = 0; j < keys / 8; ++j) {
      if (columns.stride * j >= end) scores[4 * j + 2 * i] = -infinity();
      if (columns.stride * j + columns.step >= end) scores[4 * j + 2 * i + 1] = -infinity();
    }
  }
}

/// Hides those before `begin_of_first` or `begin_of_second`.
template <int keys>
__device__ inline void hide_keys_before(float (&scores)[keys / 2], int begin_of_first, int begin_of_second,
                                        ScoreColumns columns = {}) {
  const int begin_of[rows_of_thread] = {begin_of_first, begin_of_second};
#pragma unroll
  for (int i = 0; i < rows_of_thread; ++i) {
    const int begin = begin_of[i] - columns.first;
#pragma unroll
    for (int j = 0; j < keys / 8; ++j) {
      if (columns.stride * j < begin) scores[4 * j + 2 * i] = -infinity();
      if (columns.stride * j + columns.step < begin) scores[4 * j + 2 * i + 1] = -infinity();
    }
  }
}

/// Ends the softmax of a row whose weights are 2**(score - exponent) and add up to `sum`; they may be none. Gives the
/// log-sum-exp, and what the row's weighted values are to be multiplied by: 0 where they are to become 0, whatever they
/// are.
__device__ inline float finish_softmax(float exponent, float sum, float& share) {
  share = sum == 0 ? 0 : reciprocal_approximately(sum);
  return sum == 0 ? -infinity() : (exponent + log2_approximately(sum)) * ln_of_2;
}

/// Adds a sink, which is its natural logarithm, -inf where there is none, to what finish_softmax() has given.
__device__ inline float add_sink(float lse, float sink, float& share) {
  if (sink == -infinity()) return lse;
  if (lse == -infinity()) return sink;
  if (sink == infinity() && lse < infinity()) {
    share = 0;
    return sink;
  }
  const float larger = fmaxf(lse, sink);
  const float with_sink = larger + logf(expf(lse - larger) + expf(sink - larger));
  share *= expf(lse - with_sink);
  return with_sink;
}

/// The lanes that hold a row of scores together: four side by side, as in accumulator.h.
struct Quad {
  /// Registers are few: the second row's largest score is looked for while the first row's powers are computed.
  static constexpr bool rows_in_turn = true;
  __device__ static bool is_first() { return threadIdx.x % 4 == 0; }
  __device__ static float max(float x) { return quad_max(x); }
  __device__ static float sum(float x) { return quad_sum(x); }
};
/// The same: every fourth lane, as in stream_products.h.
struct EveryFourth {
  static constexpr bool rows_in_turn = false;
  __device__ static bool is_first() { return threadIdx.x % 32 < 4; }
  __device__ static float max(float x) {
#pragma unroll
    for (int distance = 4; distance < 32; distance *= 2) x = fmaxf(x, __shfl_xor_sync(~0U, x, distance));
    return x;
  }
  __device__ static float sum(float x) {
#pragma unroll
    for (int distance = 4; distance < 32; distance *= 2) x += __shfl_xor_sync(~0U, x, distance);
    return x;
  }
};

/// Weights are 2**(scale * score - exponent), where a row's exponent is that of its reference, its largest score so
/// far, less that of the largest weight: the weight that counts most is a power of two, which loses nothing when it is
/// rounded.
template <typename Lanes>
class OnlineSoftmaxOf {
 public:
  OnlineSoftmaxOf() = default;
  __device__ explicit OnlineSoftmaxOf(float scale, float largest_exponent = 0)
      : scale_(scale), largest_exponent_(largest_exponent) {
#pragma unroll
    for (int i = 0; i < rows_of_thread; ++i) {
      reference_[i] = -infinity();
      sum_[i] = 0;
    }
  }

  /// Makes weights of a block's scores, and adds them up. rescale[i] is what everything summed before is to be
  /// multiplied by. Returns whether that differs from 1 for some row of this thread.
  template <int keys>
  __device__ bool update(float (&scores)[keys / 2], float (&rescale)[rows_of_thread]) {
    bool rescales = false;
    if constexpr (Lanes::rows_in_turn) {
      // So that the assembler does not look for both rows' largest scores first, the second is made to depend on the
      // first row's first power, which changes nothing.
      float before_any = -infinity();
#pragma unroll
      for (int i = 0; i < rows_of_thread; ++i) {
        const float largest = Lanes::max(largest_of_row<keys>(scores, i, before_any));
        rescales |= weigh_row<keys>(scores, i, largest, rescale[i]);
        before_any = scores[2 * i] * -infinity();  // -inf, or NaN: neither is a maximum
      }
    } else {
      float largest[rows_of_thread];
#pragma unroll
      for (int i = 0; i < rows_of_thread; ++i) largest[i] = Lanes::max(largest_of_row<keys>(scores, i, -infinity()));
#pragma unroll
      for (int i = 0; i < rows_of_thread; ++i) rescales |= weigh_row<keys>(scores, i, largest[i], rescale[i]);
    }
    return rescales;
  }

  /// Takes over what another thread, with weights of other keys of the same rows, has come to weigh row i relative to.
  /// Returns whether that differs from before, so that everything summed is to be multiplied by `rescale`.
  __device__ bool follow(int i, float reference, float& rescale) {
    const bool exceeds = raise_reference(i, reference, rescale);
    sum_[i] *= rescale;
    return exceeds;
  }
  __device__ float reference(int i) const { return reference_[i]; }
  /// What sums of row i are to be multiplied by whose weights are relative to a reference of before.
  __device__ float rescale_since(int i, float reference) const {
    return reference_[i] > reference ? exp2_approximately((reference - reference_[i]) * scale_) : 1;
  }

  /// The sum of row i's weights, which may then be replaced by that of more keys.
  __device__ float sum(int i) const { return Lanes::sum(sum_[i]); }
  __device__ void set_sum(int i, float sum) { sum_[i] = Lanes::is_first() ? sum : 0; }

  /// Ends the sums: see finish_softmax().
  __device__ float finish(int i, float& share) const { return finish_softmax(exponent(i), sum(i), share); }

  /// What is to be merged with other sums: the exponent of 2 that row i's weights are relative to, and their sum.
  __device__ float2 partial(int i) const {
    return make_float2(reference_[i] == -infinity() ? -infinity() : exponent(i), sum(i));
  }

 private:
  __device__ float exponent(int i) const { return fmaf(reference_[i], scale_, -largest_exponent_); }

  /// From now on weights of row i are relative to `largest`, if that exceeds all before: then it returns true.
  __device__ bool raise_reference(int i, float largest, float& rescale) {
    const float before = reference_[i];
    const bool exceeds = largest > before;
    reference_[i] = exceeds ? largest : before;
    rescale = rescale_since(i, before);
    return exceeds;
  }

  /// Makes weights of row i's scores, the largest of which is `largest`, and adds them up. Returns whether it exceeds
  /// all before.
  template <int keys>
  __device__ bool weigh_row(float (&scores)[keys / 2], int i, float largest, float& rescale) {
    const bool exceeds = raise_reference(i, largest, rescale);
    const float subtrahend = reference_[i] == -infinity() ? 0 : exponent(i);
    float sum[2] = {sum_[i] * rescale, 0};
#pragma unroll
    for (int j = 0; j < keys / 8; ++j) {
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        float& score = scores[4 * j + 2 * i + c];
        score = exp2_approximately(fmaf(score, scale_, -subtrahend));
        sum[c] += score;
      }
    }
    sum_[i] = sum[0] + sum[1];
    return exceeds;
  }

  /// The largest of `start` and those scores of row i that this thread holds.
  template <int keys>
  __device__ static float largest_of_row(const float (&scores)[keys / 2], int i, float start) {
    float largest[2] = {fmaxf(scores[2 * i], start), fmaxf(scores[2 * i + 1], start)};
#pragma unroll
    for (int j = 1; j < keys / 8; ++j) {
#pragma unroll
      for (int c = 0; c < 2; ++c) largest[c] = fmaxf(largest[c], scores[4 * j + 2 * i + c]);
    }
    return fmaxf(largest[0], largest[1]);
  }

  float scale_;
  float largest_exponent_;
  float reference_[rows_of_thread];
  float sum_[rows_of_thread];
};

using OnlineSoftmax = OnlineSoftmaxOf<Quad>;

/// Clears row i of an accumulator.
template <int columns>
__device__ inline void clear_row_if(float (&values)[columns / 2], int i, bool condition) {
#pragma unroll
  for (int j = 0; j < columns / 8; ++j) {
#pragma unroll
    for (int c = 0; c < 2; ++c) values[4 * j + 2 * i + c] = condition ? 0 : values[4 * j + 2 * i + c];
  }
}

/// Multiplies the rows of an accumulator.
template <int columns>
__device__ inline void scale_rows(float (&values)[columns / 2], const float (&factor)[rows_of_thread]) {
#pragma unroll
  for (int j = 0; j < columns / 8; ++j) {
#pragma unroll
    for (int c = 0; c < 4; ++c) values[4 * j + c] *= factor[c / 2];
  }
}

}  // namespace mate::cuda
