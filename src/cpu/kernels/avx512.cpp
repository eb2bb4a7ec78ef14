// x86 processors with AVX-512.
#include "avx512.h"

#include "table.h"

namespace mate::cpu {
namespace {

struct Avx512 : Avx512Vectors<Avx512> {};

}  // namespace

const Kernels avx512_kernels = kernels_of<Avx512>("avx512");

}  // namespace mate::cpu
