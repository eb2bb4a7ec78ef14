// x86 processors with AVX2, FMA and F16C: those since 2013.
#include <immintrin.h>

#include "table.h"

namespace mate::cpu {
namespace {

struct Avx2 : Vectors<Avx2, 8> {
  static constexpr int score_keys = 4;
  static constexpr int score_vectors = 3;
  static constexpr int sum_rows = 6;
  static constexpr int sum_vectors = 2;
  static constexpr int dot_rows = 2;

  using Vectors::load;

  static Floats load(const BFloat16* source) {
    const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(source));
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
  }

  static Floats load(const Float16* source) {
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(source)));
  }

  static Floats load(const Float8E4M3* source) {
    const __m128i bits = _mm_cvtepi8_epi16(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(source)));
    const __m128i magnitude = _mm_and_si128(bits, _mm_set1_epi16(0x7f));
    // Shifted to where float16 has them, exponent and mantissa are those of 2**-8 times the number; the one code that
    // is NaN gets float16's exponent of NaN besides.
    const __m128i nan = _mm_and_si128(_mm_cmpeq_epi16(magnitude, _mm_set1_epi16(0x7f)), _mm_set1_epi16(0x7c00));
    const __m128i sign = _mm_and_si128(bits, _mm_set1_epi16(-0x8000));
    const __m128i half = _mm_or_si128(_mm_or_si128(_mm_slli_epi16(magnitude, 7), nan), sign);
    return _mm256_cvtph_ps(half) * 256.0F;
  }

  static Floats multiply_add(Floats a, Floats b, Floats c) { return _mm256_fmadd_ps(a, b, c); }

  static Floats max(Floats a, Floats b) { return _mm256_max_ps(a, b); }

  static Floats sum_quads(Floats a, Floats b, Floats c, Floats d) {
    const __m256d ab = _mm256_castps_pd(_mm256_unpacklo_ps(a, b) + _mm256_unpackhi_ps(a, b));
    const __m256d cd = _mm256_castps_pd(_mm256_unpacklo_ps(c, d) + _mm256_unpackhi_ps(c, d));
    return _mm256_castpd_ps(_mm256_unpacklo_pd(ab, cd)) + _mm256_castpd_ps(_mm256_unpackhi_pd(ab, cd));
  }

  static Float4 fold(Floats value) { return _mm256_castps256_ps128(value) + _mm256_extractf128_ps(value, 1); }
};

}  // namespace

const Kernels avx2_kernels = kernels_of<Avx2>("avx2");

}  // namespace mate::cpu
