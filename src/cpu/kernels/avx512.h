// Vector operations of x86 processors with AVX-512 (F, BW, DQ and VL): Intel's since Skylake, AMD's since Zen 4.
#pragma once

#include <immintrin.h>

#include "vectors.h"

namespace mate::cpu {
namespace {  // files that include this are compiled for different processors

template <typename Self>
struct Avx512Vectors : Vectors<Self, 16> {
  using Base = Vectors<Self, 16>;
  using typename Base::Floats;

  static constexpr int score_keys = 8;
  static constexpr int score_vectors = 2;
  static constexpr int sum_rows = 6;
  static constexpr int sum_vectors = 4;
  static constexpr int dot_rows = 4;

  using Base::load;
  using Base::load_first;

  static Floats load(const BFloat16* source) {
    return from_bfloat16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(source)));
  }

  static Floats load(const Float16* source) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(source)));
  }

  static Floats load(const Float8E4M3* source) {
    return from_float8(_mm_loadu_si128(reinterpret_cast<const __m128i*>(source)));
  }

  static Floats load_first(const float* source, int count) { return _mm512_maskz_loadu_ps(first(count), source); }

  static Floats load_first(const BFloat16* source, int count) {
    return from_bfloat16(_mm256_maskz_loadu_epi16(first(count), source));
  }

  static Floats load_first(const Float16* source, int count) {
    return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(first(count), source));
  }

  static Floats load_first(const Float8E4M3* source, int count) {
    return from_float8(_mm_maskz_loadu_epi8(first(count), source));
  }

  static Floats multiply_add(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }

  static Floats max(Floats a, Floats b) { return _mm512_max_ps(a, b); }

  static Floats sum_quads(Floats a, Floats b, Floats c, Floats d) {
    const __m512d ab = _mm512_castps_pd(_mm512_unpacklo_ps(a, b) + _mm512_unpackhi_ps(a, b));
    const __m512d cd = _mm512_castps_pd(_mm512_unpacklo_ps(c, d) + _mm512_unpackhi_ps(c, d));
    return _mm512_castpd_ps(_mm512_unpacklo_pd(ab, cd)) + _mm512_castpd_ps(_mm512_unpackhi_pd(ab, cd));
  }

  static Float4 fold(Floats value) {
    const __m256 half = _mm512_castps512_ps256(value) + _mm512_extractf32x8_ps(value, 1);
    return _mm256_castps256_ps128(half) + _mm256_extractf128_ps(half, 1);
  }

 private:
  static __mmask16 first(int count) { return static_cast<__mmask16>((1U << count) - 1); }

  static Floats from_bfloat16(__m256i bits) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
  }

  static Floats from_float8(__m128i codes) {
    const __m256i bits = _mm256_cvtepi8_epi16(codes);
    const __m256i magnitude = _mm256_and_si256(bits, _mm256_set1_epi16(0x7f));
    // Shifted to where float16 has them, exponent and mantissa are those of 2**-8 times the number; the one code that
    // is NaN gets float16's exponent of NaN besides.
    const __m256i nan =
        _mm256_and_si256(_mm256_cmpeq_epi16(magnitude, _mm256_set1_epi16(0x7f)), _mm256_set1_epi16(0x7c00));
    const __m256i sign = _mm256_and_si256(bits, _mm256_set1_epi16(-0x8000));
    const __m256i half = _mm256_or_si256(_mm256_or_si256(_mm256_slli_epi16(magnitude, 7), nan), sign);
    return _mm512_cvtph_ps(half) * 256.0F;
  }
};

}  // namespace
}  // namespace mate::cpu
