// Memory that a call needs until its kernels have run.
#pragma once

#include <cstddef>

#include "attention/arguments.h"
#include "driver.h"

namespace mate::cuda {

/// Takes memory of a device from the caller's allocator, which must give what is freed to nobody but later work on the
/// same stream, as PyTorch's does; where there is none, from the stream's own pool.
class Scratch {
 public:
  Scratch(const Allocate& allocate, int device, CUstream stream)
      : allocate_(allocate), device_(device), stream_(stream) {}
  ~Scratch();
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

  template <typename T>
  T* take(std::int64_t count) {
    return static_cast<T*>(take_bytes(count * static_cast<std::int64_t>(sizeof(T))));
  }

 private:
  /// Rotated queries, the partition of two launches, and of each of these its parts, their tiles, and carried sums.
  static constexpr int most_pieces = 8;

  void* take_bytes(std::int64_t bytes);

  const Allocate& allocate_;
  int device_;
  CUstream stream_;
  CUdeviceptr own_[most_pieces] = {};
  int own_count_ = 0;
};

}  // namespace mate::cuda
