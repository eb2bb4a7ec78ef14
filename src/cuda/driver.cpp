#include "driver.h"

#include <dlfcn.h>

#include <optional>

#include "attention/check.h"

namespace mate::cuda {
namespace {

/// What looking for the driver found: it, or why there is none.
struct Search {
  std::optional<Driver> driver;
  std::string failure;
};

std::string describe(const Driver& driver, const char* function, CUresult result) {
  const char* name = "unknown error";
  const char* text = "";
  driver.cuGetErrorName.result_of(result, &name);
  driver.cuGetErrorString.result_of(result, &text);
  return join(function, " failed: ", name, " (", static_cast<int>(result), "): ", text);
}

Search look_for_driver() {
  // Never closed: other threads may be inside it when the process ends.
  void* const library = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
  if (library == nullptr) return {{}, join("no CUDA driver: ", dlerror())};
  try {
    const Driver driver{library};
    const CUresult result = driver.cuInit.result_of(0);
    if (result != CUDA_SUCCESS) return {{}, describe(driver, "cuInit", result)};
    return {driver, {}};
  } catch (const std::runtime_error& missing) {
    return {{}, join("the CUDA driver is older than CUDA 12.0: ", missing.what())};
  }
}

const Search& search() {
  static const Search search = look_for_driver();
  return search;
}

}  // namespace

const Driver* find_driver() { return search().driver ? &*search().driver : nullptr; }

const std::string& why_no_driver() { return search().failure; }

const Driver& driver() {
  const Driver* const found = find_driver();
  if (found == nullptr) [[unlikely]]
    fail(ErrorKind::not_implemented, "MATE cannot use a GPU here: ", why_no_driver());
  return *found;
}

DriverError::DriverError(const char* function, CUresult result)
    : std::runtime_error(describe(driver(), function, result)) {}

AllowDuringCapture::AllowDuringCapture() { driver().cuThreadExchangeStreamCaptureMode(&mode_); }

AllowDuringCapture::~AllowDuringCapture() { driver().cuThreadExchangeStreamCaptureMode.result_of(&mode_); }

}  // namespace mate::cuda
