#include "kernel_library.h"

#include "kernel_cache.h"

namespace mate::cuda {
namespace {

std::shared_mutex launching;
thread_local bool is_uninterrupted = false;

/// Its library is never unloaded: the kernel may be launched until the process ends.
CUkernel load_into_driver(const KernelSource& source) {
  const CachedKernel cached = cached_kernel(source);
  const Driver& cuda = driver();
  const AllowDuringCapture allow;
  CUlibrary library = nullptr;
  cuda.cuLibraryLoadData(&library, cached.cubin.data(), nullptr, nullptr, 0, nullptr, nullptr, 0);
  CUkernel kernel = nullptr;
  cuda.cuLibraryGetKernel(&kernel, library, source.name.c_str());
  return kernel;
}

}  // namespace

Kernel KernelFamily::load_first(const Device& device, const Id& id, const KernelSource& source) {
  std::unique_lock lock(mutex_);
  Loaded& loaded = loaded_[id.key];
  lock.unlock();
  // Threads that want the same kernel wait here for the first of them.
  const std::lock_guard loading(loaded.mutex);
  if (loaded.handle == nullptr) loaded.handle = load_into_driver(source);

  const Driver& cuda = driver();
  const AllowDuringCapture allow;
  cuda.cuKernelSetAttribute(CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES, source.shared_bytes, loaded.handle,
                            device.handle);
  // Puts the code on the device now, not when it is launched, since a launch may be captured in a graph.
  CUfunction function = nullptr;
  cuda.cuKernelGetFunction(&function, loaded.handle);

  const Kernel kernel{loaded.handle, source.shared_bytes};
  lock.lock();
  ready_.emplace(id, kernel);
  return kernel;
}

UninterruptedLaunches::UninterruptedLaunches() {
  launching.lock();
  is_uninterrupted = true;
}

UninterruptedLaunches::~UninterruptedLaunches() {
  is_uninterrupted = false;
  launching.unlock();
}

void launch_with(const Kernel& kernel, const Launch& launch, void** argument_addresses) {
  const CUlaunchAttribute attributes[] = {
      {.id = CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION,
       .value = {.programmaticStreamSerializationAllowed = 1}},
      {.id = CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION, .value = {.clusterDim = {launch.cluster_blocks, 1, 1}}}};
  const CUlaunchConfig config{
      .gridDimX = launch.grid.x,
      .gridDimY = launch.grid.y,
      .gridDimZ = launch.grid.z,
      .blockDimX = launch.block.x,
      .blockDimY = launch.block.y,
      .blockDimZ = launch.block.z,
      .sharedMemBytes = static_cast<unsigned>(kernel.shared_bytes),
      .hStream = launch.stream,
      .attrs = attributes,
      .numAttrs = launch.cluster_blocks > 1 ? 2U : 1U,
  };
  std::shared_lock lock(launching, std::defer_lock);
  if (!is_uninterrupted) lock.lock();
  // The driver takes a kernel in place of a function, and finds the function of the stream's context.
  driver().cuLaunchKernelEx(&config, reinterpret_cast<CUfunction>(kernel.handle), argument_addresses, nullptr);
}

}  // namespace mate::cuda
