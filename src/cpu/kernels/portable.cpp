// Any processor: vectors of four floats, which compilers translate to what it has.
#include "table.h"

namespace mate::cpu {
namespace {

struct Portable : Vectors<Portable, 4> {};

}  // namespace

const Kernels portable_kernels = kernels_of<Portable>("portable");

}  // namespace mate::cpu
