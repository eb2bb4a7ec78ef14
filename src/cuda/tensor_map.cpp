#include "tensor_map.h"

#include <algorithm>

#include "driver.h"

namespace mate::cuda {
namespace {

constexpr std::uint32_t element_strides[] = {1, 1, 1, 1, 1};

// Copies move bits: of the elements' type only the size matters.
CUtensorMapDataType type_of(int element_bytes) {
  return element_bytes == 1 ? CU_TENSOR_MAP_DATA_TYPE_UINT8 : CU_TENSOR_MAP_DATA_TYPE_UINT16;
}

}  // namespace

bool encode_tensor_map(TensorMap& map, int element_bytes, const void* data, std::span<const std::uint64_t> dims,
                       std::span<const std::uint64_t> byte_strides, std::span<const std::uint32_t> box,
                       CUtensorMapL2promotion promotion) {
  const auto dim_serves = [](std::uint64_t dim) { return dim >= 1 && dim <= std::uint64_t{1} << 32; };
  const auto stride_serves = [](std::uint64_t stride) { return stride % 16 == 0 && stride < std::uint64_t{1} << 40; };
  if (reinterpret_cast<std::uintptr_t>(data) % 16 != 0 || !std::ranges::all_of(dims, dim_serves) ||
      !std::ranges::all_of(byte_strides, stride_serves)) {
    return false;
  }
  driver().cuTensorMapEncodeTiled(map.bytes, type_of(element_bytes), static_cast<std::uint32_t>(dims.size()),
                                  const_cast<void*>(data), dims.data(), byte_strides.data(), box.data(),
                                  element_strides, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B, promotion,
                                  CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return true;
}

}  // namespace mate::cuda
