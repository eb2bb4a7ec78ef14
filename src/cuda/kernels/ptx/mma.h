// Matrix products of a warp (mma.sync): 16 rows by 8 columns, K = 16, elements of 16 bits, sums in float32.
//
// Lane l has, with g = l / 4 and t = l % 4: of the first operand, in words of two adjacent elements of K, rows g and g
// + 8 from 2 t on, then the same from 2 t + 8 on; of the second, column g from 2 t on, and from 2 t + 8 on; of the
// sums, row g, then row g + 8, columns 2 t and 2 t + 1.
#pragma once

#include "attention/problem.h"

namespace mate::cuda::ptx {

/// sums += a b^T.
template <ElementType element>
__device__ inline void mma(float (&sums)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
  if constexpr (element == ElementType::bfloat16) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  } else {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
}

}  // namespace mate::cuda::ptx
