// The language of device code as a compiler for the CPU reads it: CUDA's keywords, built-in variables and functions of
// a warp, for the kernels of src/cuda/kernels. It comes before them; what they have in kernels/ptx/ is replaced by the
// files of ptx/ here. driver.cpp runs what is compiled.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <initializer_list>
#include <type_traits>
#include <utility>

#define __device__
#define __forceinline__ inline
#define __global__
#define __shared__
#define __grid_constant__
#define __launch_bounds__(...)

namespace emulator {

struct Index {
  unsigned x, y, z;
};

inline constexpr int warp_lanes = 32;

/// What a lane hands to the others of its warp.
struct alignas(16) Parcel {
  unsigned char bytes[32];
};

extern "C" {
extern Index emulator_thread, emulator_block, emulator_block_size, emulator_grid_size;
extern int emulator_block_of_cluster, emulator_blocks_of_cluster;

/// Lets the other threads of the block run.
void emulator_yield();
/// Waits for all lanes of the warp. Returns what each of them has handed over, until the next call but one.
const Parcel* emulator_exchange(const Parcel* mine);
/// Arrives at a barrier of `threads` threads, and waits for the others if it is to.
void emulator_arrive(int barrier, int threads, bool waits);
/// Waits for all threads of the cluster.
void emulator_cluster_sync();
/// The shared memory of a block of the cluster.
unsigned char* emulator_memory_of(int block);
}

/// Named barriers are 0 to 15; beyond them there is one for each warpgroup.
inline constexpr int first_warpgroup_barrier = 16;

inline int lane() { return static_cast<int>(emulator_thread.x % warp_lanes); }

/// What every lane of a warp has handed over.
template <typename T>
class Exchange {
 public:
  static_assert(sizeof(T) <= sizeof(Parcel) && std::is_trivially_copyable_v<T>);

  explicit Exchange(const T& mine) {
    Parcel parcel{};
    std::memcpy(parcel.bytes, &mine, sizeof(T));
    const Parcel* const all = emulator_exchange(&parcel);
    for (int i = 0; i < warp_lanes; ++i) std::memcpy(&values_[i], all[i].bytes, sizeof(T));
  }

  T operator[](int lane) const { return values_[static_cast<unsigned>(lane) % warp_lanes]; }

  template <typename Operation>
  T reduce(const Operation& operation) const {
    T result = values_[0];
    for (int i = 1; i < warp_lanes; ++i) result = operation(result, values_[i]);
    return result;
  }

 private:
  T values_[warp_lanes];
};

}  // namespace emulator

#define threadIdx emulator::emulator_thread
#define blockIdx emulator::emulator_block
#define blockDim emulator::emulator_block_size
#define gridDim emulator::emulator_grid_size

struct uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline float2 make_float2(float x, float y) { return {x, y}; }

// Functions of a warp: all of its lanes take part.

inline void __syncwarp() { emulator::Exchange<int>(0); }
inline void __syncthreads() { emulator::emulator_arrive(0, static_cast<int>(blockDim.x), true); }

template <typename T>
T __shfl_sync(unsigned, T value, int source) {
  return emulator::Exchange<T>(value)[source];
}
template <typename T>
T __shfl_xor_sync(unsigned, T value, int distance) {
  return emulator::Exchange<T>(value)[emulator::lane() ^ distance];
}
template <typename T>
T __shfl_up_sync(unsigned, T value, int distance) {
  const int source = emulator::lane() - distance;
  return emulator::Exchange<T>(value)[source < 0 ? emulator::lane() : source];
}
inline unsigned __ballot_sync(unsigned, bool value) {
  return emulator::Exchange<unsigned>(value ? 1U << emulator::lane() : 0).reduce([](unsigned a, unsigned b) {
    return a | b;
  });
}
inline int __any_sync(unsigned lanes, bool value) { return __ballot_sync(lanes, value) != 0; }
inline int __all_sync(unsigned lanes, bool value) { return __ballot_sync(lanes, value) == ~0U; }
inline int __reduce_add_sync(unsigned, int value) {
  return emulator::Exchange<int>(value).reduce([](int a, int b) { return a + b; });
}
inline int __reduce_min_sync(unsigned, int value) {
  return emulator::Exchange<int>(value).reduce([](int a, int b) { return a < b ? a : b; });
}
inline int __reduce_max_sync(unsigned, int value) {
  return emulator::Exchange<int>(value).reduce([](int a, int b) { return a > b ? a : b; });
}

inline int min(int a, int b) { return a < b ? a : b; }
inline int max(int a, int b) { return a > b ? a : b; }
inline int __clz(unsigned x) { return x == 0 ? 32 : __builtin_clz(x); }
inline int __ffs(unsigned x) { return __builtin_ffs(static_cast<int>(x)); }
inline float __int_as_float(unsigned x) {
  float y;
  std::memcpy(&y, &x, sizeof(y));
  return y;
}
inline int __float_as_int(float x) {
  int y;
  std::memcpy(&y, &x, sizeof(y));
  return y;
}
inline float __fdividef(float a, float b) { return a / b; }
inline unsigned __byte_perm(unsigned low, unsigned high, unsigned selector) {
  const std::uint64_t bytes = static_cast<std::uint64_t>(high) << 32 | low;
  unsigned result = 0;
  for (int i = 0; i < 4; ++i) result |= static_cast<unsigned>(bytes >> 8 * (selector >> 4 * i & 7) & 0xff) << 8 * i;
  return result;
}

// The clusters of a grid run one after another.

template <typename T>
T __ldcg(const T* address) {
  return *address;
}
inline int atomicAdd(int* address, int value) {
  const int before = *address;
  *address += value;
  return before;
}

namespace mate::cuda {
/// The shared memory of the block that runs.
extern unsigned char memory[];
}  // namespace mate::cuda
