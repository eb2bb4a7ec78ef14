// The GPUs of this machine, and the contexts that their calls run in.
#pragma once

#include <string>

#include "driver.h"

namespace mate::cuda {

struct Device {
  int id = 0;  ///< as DLPack and PyTorch count
  CUdevice handle = 0;
  std::string name;
  int capability = 0;  ///< 90 for Hopper's 9.0
  int multiprocessors = 0;
  int l2_bytes = 0;
};

/// What is known of a device. Throws Error (not_implemented) where there is no driver or no such device.
const Device& device(int id);

/// Throws Error (not_implemented) for a GPU of another kind than the kernels are made for.
void require_hopper(const Device& device);

/// The driver, the devices, the compiler and the cache folder in a line of text; of what is missing, why.
std::string describe();

/// While it lives, a context of a device is the thread's current one: the caller's own where that is such a one, else
/// the device's primary context, which PyTorch and the CUDA runtime use.
class CurrentContext {
 public:
  explicit CurrentContext(const Device& device);
  ~CurrentContext();
  CurrentContext(const CurrentContext&) = delete;
  CurrentContext& operator=(const CurrentContext&) = delete;

 private:
  bool pushed_ = false;
};

}  // namespace mate::cuda
