// x86 processors with AVX-512 and its products of bfloat16 pairs: Intel's since Cooper Lake, AMD's since Zen 4.
#include "avx512.h"
#include "table.h"

namespace mate::cpu {
namespace {

struct Avx512Bf16 : Avx512Vectors<Avx512Bf16> {
  /// a[0] * b[0] + a[1] * b[1] + c in each lane, of lanes of two bfloat16.
  static Floats multiply_add_pairs(Floats a, Floats b, Floats c) {
    return _mm512_dpbf16_ps(c, std::bit_cast<__m512bh>(a), std::bit_cast<__m512bh>(b));
  }

  /// Lanes of two bfloat16: `low` and `high`, rounded.
  static Floats pair(Floats low, Floats high) {
    const __m512i halves = std::bit_cast<__m512i>(_mm512_cvtne2ps_pbh(high, low));
    const __m512i interleaved = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7,
                                                 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    return std::bit_cast<Floats>(_mm512_permutexvar_epi16(interleaved, halves));
  }
};

constexpr Kernels make_kernels() {
  Kernels kernels = kernels_of<Avx512Bf16>("avx512_bf16");
  kernels.bfloat16 = packed_kernels<Avx512Bf16, BFloat16Operands<Avx512Bf16>>();
  return kernels;
}

}  // namespace

const Kernels avx512_bf16_kernels = make_kernels();

}  // namespace mate::cpu
