#pragma once

namespace mate::cuda::ptx {

inline unsigned shared_address(const void* pointer) {
  return static_cast<unsigned>(static_cast<const unsigned char*>(pointer) - memory);
}

inline void fence_proxy_async() {}
inline void forget_shared_memory() {}
inline int known_only_here(int x) { return x; }

inline void barrier_sync(int id, int threads) { emulator::emulator_arrive(id, threads, true); }
inline void barrier_arrive(int id, int threads) { emulator::emulator_arrive(id, threads, false); }

// A lane's place in a matrix of 8 by 8: its row, and the first of its two columns.
inline int matrix_row() { return emulator::lane() / 4; }
inline int matrix_column() { return emulator::lane() % 4 * 2; }

inline void store_matrices(unsigned shared_address, const unsigned (&words)[4]) {
  const emulator::Exchange<unsigned> rows(shared_address);
  for (int i = 0; i < 4; ++i) std::memcpy(memory + rows[8 * i + matrix_row()] + 2 * matrix_column(), &words[i], 4);
  __syncwarp();
}

inline void store_matrices_transposed(unsigned shared_address, const unsigned (&words)[4]) {
  const emulator::Exchange<unsigned> rows(shared_address);
  for (int i = 0; i < 4; ++i) {
    for (int j = 0; j < 2; ++j) {
      const auto element = static_cast<unsigned short>(words[i] >> 16 * j);
      std::memcpy(memory + rows[8 * i + matrix_column() + j] + 2 * matrix_row(), &element, 2);
    }
  }
  __syncwarp();
}

inline void load_matrices_transposed(unsigned shared_address, unsigned (&words)[4]) {
  const emulator::Exchange<unsigned> rows(shared_address);
  for (int i = 0; i < 4; ++i) {
    unsigned short elements[2];
    for (int j = 0; j < 2; ++j) {
      std::memcpy(&elements[j], memory + rows[8 * i + matrix_column() + j] + 2 * matrix_row(), 2);
    }
    words[i] = elements[0] | static_cast<unsigned>(elements[1]) << 16;
  }
  __syncwarp();
}

inline unsigned transpose_matrix(unsigned words) {
  const emulator::Exchange<unsigned> all(words);
  unsigned transposed = 0;
  for (int j = 0; j < 2; ++j) {
    const unsigned both = all[(matrix_column() + j) * 4 + matrix_row() / 2];
    transposed |= (both >> matrix_row() % 2 * 16 & 0xffff) << 16 * j;
  }
  return transposed;
}

template <int registers, int before>
void set_registers() {}

}  // namespace mate::cuda::ptx
