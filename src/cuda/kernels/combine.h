// Merges partial results of the caller's.
#pragma once

#include "element.h"
#include "merge.h"
#include "ptx/launch.h"

namespace mate::cuda {

/// Writes one element, rounded to a type that is known when the kernel runs.
__device__ inline void narrow(float value, void* row, int column, ElementType type) {
  if (type == ElementType::float32) {
    static_cast<float*>(row)[column] = value;
    return;
  }
  const unsigned bits =
      type == ElementType::bfloat16 ? pack<ElementType::bfloat16>(value, 0) : pack<ElementType::float16>(value, 0);
  static_cast<unsigned short*>(row)[column] = static_cast<unsigned short>(bits);
}

/// Each warp merges rows.
__device__ inline void combine(const CombineProblem& p) {
  ptx::begin_overlapped();
  const int warps = blockDim.x / 32;
  const long long rows = static_cast<long long>(p.batch) * p.rows * p.heads;
  const long long step = static_cast<long long>(gridDim.x) * warps;
  for (long long i = static_cast<long long>(blockIdx.x) * warps + threadIdx.x / 32; i < rows; i += step) {
    const int head = static_cast<int>(i % p.heads);
    const int row = static_cast<int>(i / p.heads % p.rows);
    const int b = static_cast<int>(i / p.heads / p.rows);
    const float* const lse_of_part = &p.partial_lse.at(b, head, row);
    const auto* const sums_of_part = p.partial.at<const float>(b, row, head);
    void* const out = p.out.at(b, row, head);
    float lse = 0;
    merge_row<float, false>(
        p.splits, p.head_dim_v,
        [&](int part) {
          return PartWeight{lse_of_part[part * p.lse_split_stride] * log2_of_e, 1};
        },
        [&](int part, int column) { return __ldcg(sums_of_part + part * p.partial_split_stride + column); },
        [&](PartWeight all) {
          float share;
          lse = finish_softmax(all.max, all.sum, share);
          return share;
        },
        [&](int column, const float(&sum)[1]) { narrow(sum[0], out, column, p.out.type); });
    if (p.lse.data != nullptr && threadIdx.x % 32 == 0) p.lse.at(b, head, row) = lse;
  }
}

}  // namespace mate::cuda
