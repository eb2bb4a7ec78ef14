// Shares independent tasks over the CPU's threads.
#pragma once

#include <atomic>
#include <cstdint>
#include <exception>

#ifdef _OPENMP
#include <omp.h>
#endif

namespace mate::cpu {

/// Threads that a parallel region may use: PyTorch's number where it runs on the same OpenMP.
inline int available_threads() {
#ifdef _OPENMP
  return omp_get_max_threads();
#else
  return 1;
#endif
}

/// How many of `workers` threads are worth starting for so many elementary operations: below some, one thread is done
/// before others have begun.
inline int workers_for(double operations, int workers) { return operations < (1 << 18) ? 1 : workers; }

/// Calls run(task) for each task from 0 to tasks - 1, on up to `workers` threads: a thread that is free takes the next.
/// The first exception is thrown again once all threads have stopped.
template <typename Run>
void parallel_for(std::int64_t tasks, int workers, const Run& run) {
  if (workers <= 1 || tasks <= 1) {
    for (std::int64_t task = 0; task < tasks; ++task) run(task);
    return;
  }
  std::atomic<std::int64_t> next = 0;
  std::atomic<bool> failed = false;
  std::exception_ptr error;
  // Always the same number of threads: OpenMP ends those that a smaller team leaves over, and has to start them again.
#pragma omp parallel num_threads(workers)
  {
    try {
      for (std::int64_t task = next++; task < tasks && !failed; task = next++) run(task);
    } catch (...) {
      if (!failed.exchange(true)) error = std::current_exception();
    }
  }
  if (error) std::rethrow_exception(error);
}

}  // namespace mate::cpu
