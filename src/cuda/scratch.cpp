#include "scratch.h"

#include "attention/check.h"

namespace mate::cuda {

Scratch::~Scratch() {
  for (int i = 0; i < own_count_; ++i) driver().cuMemFreeAsync.result_of(own_[i], stream_);
}

void* Scratch::take_bytes(std::int64_t bytes) {
  if (bytes == 0) return nullptr;
  if (allocate_) {
    const DLDevice device{kDLCUDA, device_};
    return allocate_({kDLUInt, 8, 1}, device, &bytes, 1).data();
  }
  require(own_count_ < most_pieces, "a call must not take more than ", most_pieces, " pieces of memory");
  CUdeviceptr& address = own_[own_count_];
  driver().cuMemAllocAsync(&address, static_cast<std::size_t>(bytes), stream_);
  ++own_count_;
  return reinterpret_cast<void*>(address);
}

}  // namespace mate::cuda
