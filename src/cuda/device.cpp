#include "device.h"

#include <map>
#include <mutex>
#include <vector>

#include "attention/check.h"
#include "compiler.h"
#include "kernel_cache.h"

namespace mate::cuda {
namespace {

Device describe_device(int id) {
  const Driver& cuda = driver();
  Device device;
  device.id = id;
  cuda.cuDeviceGet(&device.handle, id);
  char name[256] = {};
  cuda.cuDeviceGetName(name, sizeof name, device.handle);
  device.name = name;
  const auto attribute = [&](CUdevice_attribute which) {
    int value = 0;
    cuda.cuDeviceGetAttribute(&value, which, device.handle);
    return value;
  };
  device.capability = 10 * attribute(CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR) +
                      attribute(CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR);
  device.multiprocessors = attribute(CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT);
  device.l2_bytes = attribute(CU_DEVICE_ATTRIBUTE_L2_CACHE_SIZE);
  return device;
}

const std::vector<Device>& devices() {
  static const std::vector<Device> devices = [] {
    int count = 0;
    driver().cuDeviceGetCount(&count);
    std::vector<Device> devices;
    for (int id = 0; id < count; ++id) devices.push_back(describe_device(id));
    return devices;
  }();
  return devices;
}

/// Kept for good: were ours the last reference, giving it back would free all memory of the device.
CUcontext primary_context(const Device& device) {
  static std::mutex mutex;
  static std::map<CUdevice, CUcontext> contexts;
  const std::lock_guard lock(mutex);
  CUcontext& context = contexts[device.handle];
  if (context == nullptr) driver().cuDevicePrimaryCtxRetain(&context, device.handle);
  return context;
}

std::string describe_driver_and_devices() {
  if (find_driver() == nullptr) return why_no_driver();
  int version = 0;
  driver().cuDriverGetVersion(&version);
  std::string text = join("driver for CUDA ", version / 1000, ".", version % 1000 / 10);
  for (const Device& device : devices()) {
    text += join(", cuda:", device.id, " ", device.name, " (capability ", device.capability / 10, ".",
                 device.capability % 10, ", ", device.multiprocessors, " multiprocessors)");
  }
  return text;
}

}  // namespace

const Device& device(int id) {
  if (find_driver() == nullptr) [[unlikely]]
    fail(ErrorKind::not_implemented, "MATE cannot use the device cuda:", id, ": ", why_no_driver());
  const std::size_t count = devices().size();
  if (id < 0 || static_cast<std::size_t>(id) >= count) [[unlikely]]
    fail(ErrorKind::not_implemented, "MATE cannot use the device cuda:", id, ": this machine has ", count, " of them");
  return devices()[id];
}

void require_hopper(const Device& device) {
  if (device.capability == 90) [[likely]]
    return;
  fail(ErrorKind::not_implemented, "on an NVIDIA GPU MATE does not serve compute capability ", device.capability / 10,
       ".", device.capability % 10, " (", device.name, "), only Hopper's 9.0, yet");
}

std::string describe() {
  std::string text;
  for (const auto& part : {describe_driver_and_devices, describe_compiler, describe_cache}) {
    if (!text.empty()) text += "; ";
    try {
      text += part();
    } catch (const std::exception& error) {
      text += error.what();
    }
  }
  return text;
}

CurrentContext::CurrentContext(const Device& device) {
  const Driver& cuda = driver();
  CUcontext current = nullptr;
  cuda.cuCtxGetCurrent(&current);
  if (current != nullptr) {
    CUdevice current_device = -1;
    cuda.cuCtxGetDevice(&current_device);
    if (current_device == device.handle) return;
  }
  cuda.cuCtxPushCurrent(primary_context(device));
  pushed_ = true;
}

CurrentContext::~CurrentContext() {
  CUcontext popped = nullptr;
  if (pushed_) driver().cuCtxPopCurrent.result_of(&popped);
}

}  // namespace mate::cuda
