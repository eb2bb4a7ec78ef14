// What the tensor copy engine knows of a tensor: written by the driver, opaque to everybody else.
#pragma once

namespace mate::cuda {

struct alignas(64) TensorMap {
  unsigned char bytes[128];
};

}  // namespace mate::cuda
