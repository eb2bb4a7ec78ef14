#pragma once

#include "attention/problem.h"
#include "ptx/convert.h"

namespace mate::cuda::ptx {

template <ElementType element>
void mma(float (&sums)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
  struct Operands {
    unsigned a[4];
    unsigned b[2];
  };
  const emulator::Exchange<Operands> all(Operands{{a[0], a[1], a[2], a[3]}, {b0, b1}});
  const int g = emulator::lane() / 4;
  const int t = emulator::lane() % 4;
  for (int i = 0; i < 4; ++i) {
    for (int k = 0; k < 16; ++k) {
      const Operands of_row = all[4 * g + k % 8 / 2];
      const Operands of_column = all[4 * (2 * t + i % 2) + k % 8 / 2];
      sums[i] +=
          element_of<element>(of_row.a[k / 8 * 2 + i / 2], k % 2) * element_of<element>(of_column.b[k / 8], k % 2);
    }
  }
}

}  // namespace mate::cuda::ptx
