#pragma once

#include "attention/problem.h"
#include "ptx/convert.h"
#include "ptx/shared.h"

namespace mate::cuda::ptx {

// Products are made when they are started. Who waits for them waits for the whole warpgroup, which reads the same
// shared memory.
inline void wgmma_fence() {}
inline void wgmma_commit() {}
template <int running>
void wgmma_wait() {
  barrier_sync(emulator::first_warpgroup_barrier + static_cast<int>(threadIdx.x / 128), 128);
}
template <int size>
void hold(float (&)[size]) {}

enum class Major { k, mn };

inline unsigned matrix_at(unsigned shared_address, int chunk_bytes = 0) {
  return (shared_address & 0x3ffff) >> 4 | static_cast<unsigned>(chunk_bytes >> 4) << 16;
}
inline unsigned advance(unsigned matrix, int bytes) { return matrix + (bytes >> 4); }

/// An element of a matrix in shared memory: column k of row `row`, which is along the sum.
template <ElementType element, Major major>
float element_at(unsigned matrix, int row, int k) {
  constexpr int bytes = bytes_of(element);
  constexpr int row_bytes = 128;
  constexpr int columns = row_bytes / bytes;  // of a chunk
  const unsigned chunk_bytes = matrix >> 16 << 4;
  unsigned at = (matrix & 0xffff) << 4;
  at += major == Major::k ? row * row_bytes + k * bytes
                          : row / columns * chunk_bytes + k * row_bytes + row % columns * bytes;
  at ^= (at >> 7 & 7) << 4;
  unsigned bits = 0;
  std::memcpy(&bits, memory + at, bytes);
  return element_of<element>(bits, 0);
}

/// d = a (64, K) b^T, plus d where `accumulate`, of whose rows a thread has two, and two of every eight of the other's:
/// see accumulator.h.
template <ElementType element, int n, Major major, int first, int size, int sum>
void multiply(float (&d)[size], const float (&a)[2][sum], unsigned b_matrix, int accumulate) {
  if (accumulate == 0) std::memset(d + first, 0, n / 2 * sizeof(float));
  for (int j = 0; j < n / 8; ++j) {
    for (int c = 0; c < 2; ++c) {
      const int row = 8 * j + matrix_column() + c;
      for (int k = 0; k < sum; ++k) {
        const float b = element_at<element, major>(b_matrix, row, k);
        for (int i = 0; i < 2; ++i) d[first + 4 * j + 2 * i + c] += a[i][k] * b;
      }
    }
  }
}

/// Elements that an instruction sums up.
template <ElementType element>
inline constexpr int sum_of = 32 / bytes_of(element);

template <ElementType element, int n, Major b_major = Major::k, int first = 0, int size>
void wgmma(float (&d)[size], unsigned a_matrix, unsigned b_matrix, int accumulate) {
  float a[2][sum_of<element>];
  for (int i = 0; i < 2; ++i) {
    const int row = static_cast<int>(threadIdx.x % 128 / 32) * 16 + matrix_row() + 8 * i;
    for (int k = 0; k < sum_of<element>; ++k) a[i][k] = element_at<element, Major::k>(a_matrix, row, k);
  }
  multiply<element, n, b_major, first>(d, a, b_matrix, accumulate);
}

template <ElementType element, int n, int first = 0, bool may_replace = false,
          Major b_major = element == ElementType::float8_e4m3 ? Major::k : Major::mn, int size>
void wgmma(float (&d)[size], const unsigned* a, unsigned b_matrix, int accumulate = 1) {
  constexpr int elements = 4 / bytes_of(element);  // of a word
  struct Words {
    unsigned of[4];
  };
  const emulator::Exchange<Words> all(Words{{a[0], a[1], a[2], a[3]}});
  float rows[2][sum_of<element>];
  for (int i = 0; i < 2; ++i) {
    for (int k = 0; k < sum_of<element>; ++k) {
      const int half = k / (4 * elements);
      const int lane = k / elements % 4;
      rows[i][k] = element_of<element>(all[4 * matrix_row() + lane].of[2 * half + i], k % elements);
    }
  }
  multiply<element, n, b_major, first>(d, rows, b_matrix, may_replace ? accumulate : 1);
}

}  // namespace mate::cuda::ptx
