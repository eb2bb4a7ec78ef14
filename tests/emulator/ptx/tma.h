#pragma once

#include "ptx/cluster.h"
#include "tensor_description.h"
#include "tensor_map.h"

namespace mate::cuda::ptx {

inline void prefetch(const TensorMap&) {}

/// Into a block of the cluster: rows of 128 bytes, each of which has its pieces of 16 bytes permuted by where it stands
/// among eight.
template <typename... Coordinates>
void load_box_to(int block, void* shared, const TensorMap& map, Mbarrier& barrier, Coordinates... coordinates) {
  unsigned char* const memory = emulator::emulator_memory_of(block);
  constexpr unsigned row_bytes = 128;
  const emulator::TensorDescription* tensor = nullptr;
  std::memcpy(&tensor, map.bytes, sizeof(tensor));
  const std::int64_t first[] = {coordinates...};
  if (tensor->rank != sizeof...(coordinates)) std::abort();
  unsigned rows = 1;
  for (int i = 1; i < tensor->rank; ++i) rows *= tensor->box[i];
  const auto is_inside = [&](std::int64_t x, int i) {
    return x >= 0 && static_cast<std::uint64_t>(x) < tensor->extents[i];
  };
  for (unsigned row = 0; row < rows; ++row) {
    bool row_is_inside = true;
    std::int64_t offset = 0;
    unsigned rest = row;
    for (int i = 1; i < tensor->rank; ++i) {
      const std::int64_t x = first[i] + rest % tensor->box[i];
      rest /= tensor->box[i];
      row_is_inside = row_is_inside && is_inside(x, i);
      offset += x * static_cast<std::int64_t>(tensor->strides[i]);
    }
    const unsigned at = shared_address(shared) + row * row_bytes;
    for (unsigned i = 0; i < tensor->box[0]; ++i) {
      const unsigned byte = i * tensor->element_bytes;
      unsigned char* const to = memory + at + (byte / 16 ^ at / row_bytes % 8) * 16 + byte % 16;
      const std::int64_t x = first[0] + i;
      if (row_is_inside && is_inside(x, 0)) {
        std::memcpy(to, tensor->data + offset + x * tensor->element_bytes, tensor->element_bytes);
      } else {
        std::memset(to, 0, tensor->element_bytes);
      }
    }
  }
  of_block(block, barrier).bring(static_cast<int>(rows * row_bytes));
}

template <typename... Coordinates>
void load_box(void* shared, const TensorMap& map, Mbarrier& barrier, Coordinates... coordinates) {
  load_box_to(block_of_cluster(), shared, map, barrier, coordinates...);
}

enum class CachePolicy { evict_normal, evict_first };
inline CachePolicy policy_of(bool) { return CachePolicy::evict_normal; }
template <typename... Coordinates>
void load_box(void* shared, const TensorMap& map, Mbarrier& barrier, CachePolicy, Coordinates... coordinates) {
  load_box(shared, map, barrier, coordinates...);
}

template <typename... Coordinates>
void load_box_for_cluster(void* shared, const TensorMap& map, Mbarrier& barrier, CachePolicy, unsigned short blocks,
                          Coordinates... coordinates) {
  for (int block = 0; blocks >> block != 0; ++block) {
    if ((blocks >> block & 1) != 0) load_box_to(block, shared, map, barrier, coordinates...);
  }
}

}  // namespace mate::cuda::ptx
