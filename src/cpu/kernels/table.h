// The table of kernels of an instruction set.
#pragma once

#include "cpu/kernels.h"
#include "products.h"
#include "rows.h"
#include "softmax.h"

namespace mate::cpu {

// One for each file of this folder. Those that this processor lacks must not be called.
extern const Kernels portable_kernels;
#ifdef __x86_64__
extern const Kernels avx2_kernels;
extern const Kernels avx512_kernels;
extern const Kernels avx512_bf16_kernels;
#endif

template <typename Isa, typename Operands>
constexpr PackedKernels packed_kernels() {
  return {
      Operands::numbers_per_lane,
      Operands::pack_queries,
      Operands::pack_keys,
      Operands::pack_values,
      multiply_scores<Isa, Operands>,
      update_softmax<Isa, Operands>,
      accumulate_packed<Isa, Operands>,
  };
}

template <typename Isa>
constexpr Kernels kernels_of(const char* name) {
  return {
      name,
      widen_row<Isa>,
      narrow_row<Isa>,
      cap_scores<Isa>,
      dot_scores<Isa>,
      sum_placed_values<Isa>,
      add_block<Isa>,
      packed_kernels<Isa, Float32Operands<Isa>>(),
      PackedKernels{},
  };
}

}  // namespace mate::cpu
