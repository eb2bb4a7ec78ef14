// Sums of values that are set aside every so many keys.
//
// The matrix units keep fewer bits of sums of e4m3 products than float32 has, and drop the rest: what is added to a sum
// that has grown large loses most of itself, always towards zero. So an accumulator is emptied before that, into sums
// in shared memory or, if those do not fit there, in memory that the L2 cache holds.
#pragma once

#include "forward_shared.h"
#include "ptx/shared.h"
#include "softmax.h"

namespace mate::cuda {

/// Of a consumer: each thread has sums of its own. Where there is no need for that, nothing: no block comes before 0.
template <ForwardVariant variant, bool needed = variant.e4m3>
class CarriedSums {
 public:
  using Sums = float (&)[variant.consumer_columns() / 2];

  __device__ CarriedSums(const ForwardArguments&, ForwardShared<variant>&, int) {}
  __device__ void begin(int) {}
  __device__ int next() const { return 0; }
  __device__ bool is_due(int) const { return false; }
  __device__ void carry(Sums, const OnlineSoftmax&, int) {}
  __device__ void add_to(Sums, const OnlineSoftmax&) const {}
};

template <ForwardVariant variant>
class CarriedSums<variant, true> {
 public:
  using Sums = float (&)[variant.consumer_columns() / 2];

  __device__ CarriedSums(const ForwardArguments& arguments, ForwardShared<variant>& shared, int consumer)
      : a_(arguments), shared_(shared), consumer_(consumer) {}

  /// A part, whose first block of keys is n: the blocks that come have lower numbers.
  __device__ void begin(int n) {
    any_ = false;
    next_ = n - variant.blocks_between_carries();
  }

  /// The block from which on sums are to be set aside when one is done.
  __device__ int next() const { return next_; }
  __device__ bool is_due(int n) const { return n <= next_ && has_room(); }

  /// Sets the sums aside that there are when block n comes next.
  __device__ void carry(Sums sums, const OnlineSoftmax& softmax, int n) {
    add_to(sums, softmax);
    float4* const target = carried();
#pragma unroll
    for (int j = 0; j < pieces; ++j) {
      target[j * threads] = make_float4(sums[4 * j], sums[4 * j + 1], sums[4 * j + 2], sums[4 * j + 3]);
    }
    __syncwarp();  // all lanes of the row have read its reference
    if (accumulator_column() == 0) {
#pragma unroll
      for (int i = 0; i < rows_of_thread; ++i) references()[8 * i] = softmax.reference(i);
    }
    __syncwarp();
#pragma unroll
    for (float& sum : sums) sum = 0;
    any_ = true;
    next_ = n - variant.blocks_between_carries();
  }

  /// Adds what was set aside to sums that are of other keys.
  __device__ void add_to(Sums sums, const OnlineSoftmax& softmax) const {
    if (!any_) return;
    float rescale[rows_of_thread];
#pragma unroll
    for (int i = 0; i < rows_of_thread; ++i) rescale[i] = softmax.rescale_since(i, references()[8 * i]);
    const float4* const source = carried();
#pragma unroll
    for (int j = 0; j < pieces; ++j) {
      const float4 before = source[j * threads];
      sums[4 * j] += before.x * rescale[0];
      sums[4 * j + 1] += before.y * rescale[0];
      sums[4 * j + 2] += before.z * rescale[1];
      sums[4 * j + 3] += before.w * rescale[1];
    }
  }

 private:
  static constexpr int threads = 128;                            // of a consumer
  static constexpr int pieces = variant.consumer_columns() / 8;  // of four sums, of a thread

  __device__ bool has_room() const { return variant.carries_in_shared() || a_.carried_sums != nullptr; }

  // Where this thread's are: found anew each time, which is rare.
  __device__ float4* carried() const {
    const int thread = ptx::known_only_here(static_cast<int>(threadIdx.x)) % threads;
    const int first = consumer_ * pieces * threads + thread;
    if constexpr (variant.carries_in_shared()) {
      return reinterpret_cast<float4*>(shared_.carried_sums.tiles[0].rows) + first;
    } else {
      const long long of_block = static_cast<long long>(blockIdx.x) * variant.carried_sums();
      return reinterpret_cast<float4*>(a_.carried_sums + of_block) + first;
    }
  }
  /// What the weights of its first row's sums are relative to; 8 further on, its second row's.
  __device__ float* references() const { return shared_.references + 64 * consumer_ + accumulator_row(0); }

  const ForwardArguments& a_;
  ForwardShared<variant>& shared_;
  int consumer_;
  int next_ = 0;
  bool any_ = false;
};

}  // namespace mate::cuda
