// What a prefill kernel is launched with.
#pragma once

#include "attention/problem.h"
#include "tensor_map.h"

namespace mate::cuda {

struct PrefillArguments {
  TensorMap q;  ///< (d, pack, rows, head units, slots), in boxes of a tile's rows; the maps are of no use to a gather
  TensorMap k;  ///< (d, heads, rows, slots), in boxes of a block's keys
  TensorMap v;
  Problem problem;
  int pack = 1;                ///< query heads that share a tile: all of a group, or one
  float heads_reciprocal = 1;  ///< 1 / pack
  float score_factor = 1;      ///< multiplies products before they are capped and compared: 1, but for odd scales
  float exponent_scale = 1;    ///< multiplies scores to make them exponents of 2; not negative
  int keys_in_l2 = 0;          ///< keys and values of one head that the L2 cache holds
  int copy_bytes = 0;          ///< of a gather: rows are copied in pieces of so many bytes
  bool wide_rows = false;      ///< rows of out are aligned to 16 bytes
  int* tiles_taken = nullptr;  ///< 0 before and after
};

}  // namespace mate::cuda
