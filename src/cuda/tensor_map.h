// Tensor maps: what the tensor copy engine has to know of a tensor.
#pragma once

#include <cstdint>
#include <span>

#include "driver.h"
#include "kernels/tensor_map.h"

namespace mate::cuda {

/// Describes a tensor, its innermost dimension first, for copies of `box` elements whose rows of up to 128 bytes are
/// swizzled, with zeros for what lies outside the tensor. Elements are adjacent along the innermost dimension, whose
/// stride is left out. False where the copy engine cannot read such a tensor: its address and strides must be multiples
/// of 16 bytes, strides below 2**40 bytes, and dimensions from 1 to 2**32. `promotion` says how much the L2 cache reads
/// from memory for what it does not have.
bool encode_tensor_map(TensorMap& map, int element_bytes, const void* data, std::span<const std::uint64_t> dims,
                       std::span<const std::uint64_t> byte_strides, std::span<const std::uint32_t> box,
                       CUtensorMapL2promotion promotion = CU_TENSOR_MAP_L2_PROMOTION_L2_256B);

}  // namespace mate::cuda
