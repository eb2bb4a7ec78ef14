// What a tensor map stands for: the driver leaves a pointer to it in the map, which the copy engine follows.
#pragma once

#include <cstdint>

namespace emulator {

struct TensorDescription {
  unsigned char* data;
  int element_bytes;
  int rank;
  std::uint64_t extents[5];
  std::uint64_t strides[5];  ///< in bytes
  std::uint32_t box[5];
};

}  // namespace emulator
