#include "kernels.h"

namespace mate::cpu {

const Kernels& kernels() { return portable_kernels; }

}  // namespace mate::cpu
