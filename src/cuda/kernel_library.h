// Kernels in memory, ready to be launched, and their launch.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <mutex>
#include <shared_mutex>
#include <unordered_map>

#include "compiler.h"
#include "device.h"
#include "driver.h"

namespace mate::cuda {

/// A kernel that is loaded for a device: any context of it, and any thread, may launch it.
struct Kernel {
  CUkernel handle = nullptr;
  int shared_bytes = 0;  ///< dynamic shared memory of a block
};

/// The kernels of one family, which a number tells apart. Lives as long as the process.
class KernelFamily {
 public:
  /// The kernel of number `key`. Where this call is the first for it, `write_source()` makes its KernelSource, which is
  /// read from the cache or compiled, once, while other kernels go on. A context of the device must be current.
  template <typename WriteSource>
  Kernel load(const Device& device, std::uint64_t key, const WriteSource& write_source) {
    const Id id{device.id, key};
    {
      const std::shared_lock lock(mutex_);
      const auto found = ready_.find(id);
      if (found != ready_.end()) [[likely]]
        return found->second;
    }
    return load_first(device, id, write_source());
  }

 private:
  struct Id {
    int device;
    std::uint64_t key;

    bool operator==(const Id&) const = default;
  };
  struct HashId {
    std::size_t operator()(const Id& id) const { return std::hash<std::uint64_t>()(id.key) * 31 + id.device; }
  };
  /// A kernel of all devices. Null until it is loaded.
  struct Loaded {
    std::mutex mutex;
    CUkernel handle = nullptr;
  };

  Kernel load_first(const Device& device, const Id& id, const KernelSource& source);

  std::shared_mutex mutex_;  // guards both maps, not what they hold
  std::unordered_map<Id, Kernel, HashId> ready_;
  std::unordered_map<std::uint64_t, Loaded> loaded_;
};

/// The kernels whose source a function writes.
template <auto write_source>
KernelFamily& kernels_of() {
  static KernelFamily kernels;
  return kernels;
}

struct Extent {
  unsigned x = 1;
  unsigned y = 1;
  unsigned z = 1;
};

/// How a kernel is launched.
struct Launch {
  Extent grid;   ///< in blocks
  Extent block;  ///< in threads
  CUstream stream = nullptr;
  unsigned cluster_blocks = 1;  ///< of the grid's first dimension, a multiple of it
};

/// While one exists, no other thread of the process launches a kernel: nothing comes between those of this one, on
/// whatever stream.
class UninterruptedLaunches {
 public:
  UninterruptedLaunches();
  ~UninterruptedLaunches();
  UninterruptedLaunches(const UninterruptedLaunches&) = delete;
  UninterruptedLaunches& operator=(const UninterruptedLaunches&) = delete;
};

/// Launches a kernel with the addresses of its arguments, while the stream's earlier ones run to their end: each kernel
/// of the library waits for that by ptx::await_earlier_kernels(), or is let begin by one that has (side_by_side.h).
void launch_with(const Kernel& kernel, const Launch& launch, void** argument_addresses);

/// Launches a kernel. The arguments are of the very types of its parameters. A context of the device must be current.
template <typename... Arguments>
void launch(const Kernel& kernel, const Launch& launch, const Arguments&... arguments) {
  void* addresses[] = {const_cast<Arguments*>(&arguments)...};
  launch_with(kernel, launch, addresses);
}

}  // namespace mate::cuda
