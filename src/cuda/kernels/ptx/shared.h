// Shared memory as PTX addresses it, and the barriers of warps and warpgroups.
#pragma once

namespace mate::cuda::ptx {

/// The address of shared memory in its own window, as instructions take it.
__device__ inline unsigned shared_address(const void* pointer) {
  return static_cast<unsigned>(__cvta_generic_to_shared(pointer));
}

/// Makes this thread's ordinary writes to shared memory visible to the copy engine and the matrix units.
__device__ inline void fence_proxy_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

/// What the compiler knows of shared memory it has to read again: for code with few registers, which had better not
/// hold copies.
__device__ inline void forget_shared_memory() { asm volatile("" ::: "memory"); }

/// The same number, of which the compiler knows nothing: it computes nothing from it before this is reached.
__device__ inline int known_only_here(int x) {
  asm volatile("" : "+r"(x));
  return x;
}

/// Waits until `threads` threads have arrived at named barrier `id`, this one included.
__device__ inline void barrier_sync(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

/// Arrives at named barrier `id` without waiting.
__device__ inline void barrier_arrive(int id, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

/// A warp stores four matrices of 8 by 8 elements of 16 bits (stmatrix). words[i] holds two elements of matrix i, as an
/// accumulator does: those of row l / 4 from column 2 (l % 4) on in lane l. Lane l passes where row l % 8 of matrix l /
/// 8 begins.
__device__ inline void store_matrices(unsigned shared_address, const unsigned (&words)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(shared_address), "r"(words[0]),
               "r"(words[1]), "r"(words[2]), "r"(words[3])
               : "memory");
}

/// The same, each transposed: words[i] holds elements of column l / 4, in rows 2 (l % 4) and the next.
__device__ inline void store_matrices_transposed(unsigned shared_address, const unsigned (&words)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(shared_address),
               "r"(words[0]), "r"(words[1]), "r"(words[2]), "r"(words[3])
               : "memory");
}

/// A warp loads four matrices of 8 by 8 elements of 16 bits, each transposed (ldmatrix): lane l gets of matrix i the
/// elements of column l / 4 in rows 2 (l % 4) and the next. Lane l passes where row l % 8 of matrix l / 8 begins.
__device__ inline void load_matrices_transposed(unsigned shared_address, unsigned (&words)[4]) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
               : "r"(shared_address)
               : "memory");
}

/// A warp transposes a matrix of 8 by 8 elements of 16 bits, of which each lane has two of a row (movmatrix): lane l
/// has those of row l / 4 from column 2 (l % 4) on, before and after.
__device__ inline unsigned transpose_matrix(unsigned words) {
  unsigned transposed;
  asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(transposed) : "r"(words));
  return transposed;
}

/// Sets how many registers each thread of this warpgroup has, which have had `before`: the whole warpgroup calls it.
template <int registers, int before>
__device__ inline void set_registers() {
  if constexpr (registers < before) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(registers));
  } else {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(registers));
  }
}

}  // namespace mate::cuda::ptx
