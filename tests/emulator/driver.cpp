// A CUDA driver (libcuda.so.1) whose one GPU is the CPU: memory is the process's own, and kernels are what compiler.cpp
// has made of them. The blocks of a grid run one after another, the threads of a block in turns, each until it waits.
#include "cuda/driver.h"

#include <dlfcn.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "device.h"
#include "tensor_description.h"

using namespace emulator;
using namespace mate::cuda;

extern "C" {
Index emulator::emulator_thread, emulator::emulator_block, emulator::emulator_block_size, emulator::emulator_grid_size;
}

namespace {

using Kernel = void (*)(void** arguments);

constexpr int multiprocessors = 4;
constexpr int l2_bytes = 50 << 20;

/// A block of threads while it runs.
class Block {
 public:
  Block(Kernel kernel, void** arguments, int threads)
      : kernel_(kernel), arguments_(arguments), threads_(threads), warps_((threads + warp_lanes - 1) / warp_lanes) {}

  void run() {
    running_ = this;
    for (int i = 0; i < static_cast<int>(threads_.size()); ++i) start(i);
    int left = static_cast<int>(threads_.size());
    for (int idle_rounds = 0; left > 0; ++idle_rounds) {
      if (idle_rounds > most_idle_rounds) die("threads wait for each other");
      for (current_ = 0; current_ < static_cast<int>(threads_.size()); ++current_) {
        Thread& thread = threads_[current_];
        if (thread.ended) continue;
        emulator_thread = {static_cast<unsigned>(current_), 0, 0};
        swapcontext(&scheduler_, &thread.context);
        if (thread.ended) --left;
      }
      if (std::exchange(moved_, false)) idle_rounds = 0;
    }
  }

  void yield() { swapcontext(&threads_[current_].context, &scheduler_); }

  const Parcel* exchange(const Parcel& mine) {
    Warp& warp = warps_[current_ / warp_lanes];
    const unsigned round = warp.round;
    Parcel* const parcels = warp.parcels[round % 2];
    parcels[current_ % warp_lanes] = mine;
    if (++warp.arrived == warp_lanes) {
      warp.arrived = 0;
      ++warp.round;
      moved_ = true;
    }
    while (warp.round == round) yield();
    return parcels;
  }

  void arrive(int id, int threads, bool waits) {
    Barrier& barrier = barriers_[id];
    const unsigned round = barrier.round;
    if (++barrier.arrived == threads) {
      barrier.arrived = 0;
      ++barrier.round;
      moved_ = true;
    }
    while (waits && barrier.round == round) yield();
  }

  static Block& running() { return *running_; }

 private:
  static constexpr int most_idle_rounds = 10000;
  static constexpr std::size_t stack_bytes = 256 * 1024;
  static constexpr int most_threads = 1024;

  struct Thread {
    ucontext_t context;
    bool ended = false;
  };
  struct Warp {
    int arrived = 0;
    unsigned round = 0;
    Parcel parcels[2][warp_lanes];
  };
  struct Barrier {
    int arrived = 0;
    unsigned round = 0;
  };

  void start(int thread) {
    static char* const stacks = static_cast<char*>(mmap(nullptr, stack_bytes * most_threads, PROT_READ | PROT_WRITE,
                                                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
    ucontext_t& context = threads_[thread].context;
    getcontext(&context);
    context.uc_stack.ss_sp = stacks + stack_bytes * thread;
    context.uc_stack.ss_size = stack_bytes;
    context.uc_link = nullptr;
    makecontext(
        &context, [] { running_->run_thread(); }, 0);
  }

  void run_thread() {
    kernel_(arguments_);
    threads_[current_].ended = true;
    moved_ = true;
    yield();
  }

  [[noreturn]] void die(const char* reason) const {
    std::fprintf(stderr, "block %u of %u: %s; those of warps", emulator_block.x, emulator_grid_size.x, reason);
    for (std::size_t i = 0; i < threads_.size(); i += warp_lanes) {
      if (!threads_[i].ended) std::fprintf(stderr, " %zu", i / warp_lanes);
    }
    std::fprintf(stderr, "\n");
    std::abort();
  }

  static Block* running_;

  Kernel kernel_;
  void** arguments_;
  std::vector<Thread> threads_;
  std::vector<Warp> warps_;
  Barrier barriers_[first_warpgroup_barrier + most_threads / 128];
  ucontext_t scheduler_{};
  int current_ = 0;
  bool moved_ = false;  ///< something that others may wait for
};

Block* Block::running_ = nullptr;

/// What handles point to: nothing looks there.
int anything;

template <typename Handle>
Handle some() {
  return reinterpret_cast<Handle>(&anything);
}

}  // namespace

extern "C" {

void emulator::emulator_yield() { Block::running().yield(); }
const Parcel* emulator::emulator_exchange(const Parcel* mine) { return Block::running().exchange(*mine); }
void emulator::emulator_arrive(int barrier, int threads, bool waits) {
  Block::running().arrive(barrier, threads, waits);
}

#define MATE_DRIVER_FUNCTION(name, parameters, ...) \
  CUresult name parameters {                        \
    __VA_ARGS__;                                    \
    return CUDA_SUCCESS;                            \
  }

MATE_DRIVER_FUNCTION(cuInit, (unsigned))
MATE_DRIVER_FUNCTION(cuGetErrorName, (CUresult, const char** name), *name = "CUDA_ERROR_NOT_FOUND")
MATE_DRIVER_FUNCTION(cuGetErrorString, (CUresult, const char** text), *text = "the kernel's library cannot be opened")
MATE_DRIVER_FUNCTION(cuDriverGetVersion, (int* version), *version = 13000)
MATE_DRIVER_FUNCTION(cuDeviceGetCount, (int* count), *count = 1)
MATE_DRIVER_FUNCTION(cuDeviceGet, (CUdevice * device, int), *device = 0)
MATE_DRIVER_FUNCTION(cuDeviceGetName, (char* name, int size, CUdevice), std::snprintf(name, size, "emulator"))
MATE_DRIVER_FUNCTION(cuDevicePrimaryCtxRetain, (CUcontext * context, CUdevice), *context = some<CUcontext>())
MATE_DRIVER_FUNCTION(cuCtxGetCurrent, (CUcontext * context), *context = some<CUcontext>())
MATE_DRIVER_FUNCTION(cuCtxGetDevice, (CUdevice * device), *device = 0)
MATE_DRIVER_FUNCTION(cuCtxGetId, (CUcontext, unsigned long long* id), *id = 1)
MATE_DRIVER_FUNCTION(cuCtxPushCurrent_v2, (CUcontext))
MATE_DRIVER_FUNCTION(cuCtxPopCurrent_v2, (CUcontext * context), *context = some<CUcontext>())
MATE_DRIVER_FUNCTION(cuKernelGetFunction, (CUfunction * function, CUkernel kernel),
                     *function = reinterpret_cast<CUfunction>(kernel))
MATE_DRIVER_FUNCTION(cuKernelSetAttribute, (CUfunction_attribute, int, CUkernel, CUdevice))
MATE_DRIVER_FUNCTION(cuMemAlloc_v2, (CUdeviceptr * address, std::size_t bytes),
                     *address = reinterpret_cast<CUdeviceptr>(std::malloc(bytes)))
// What nobody has written is NaN.
MATE_DRIVER_FUNCTION(cuMemAllocAsync, (CUdeviceptr * address, std::size_t bytes, CUstream),
                     *address = reinterpret_cast<CUdeviceptr>(std::memset(std::malloc(bytes), 0xff, bytes)))
MATE_DRIVER_FUNCTION(cuMemFreeAsync, (CUdeviceptr address, CUstream), std::free(reinterpret_cast<void*>(address)))
MATE_DRIVER_FUNCTION(cuMemsetD32Async, (CUdeviceptr address, unsigned value, std::size_t count, CUstream),
                     for (std::size_t i = 0; i < count; ++i) reinterpret_cast<unsigned*>(address)[i] = value)
MATE_DRIVER_FUNCTION(cuMemcpyDtoHAsync_v2, (void* to, CUdeviceptr from, std::size_t bytes, CUstream),
                     std::memcpy(to, reinterpret_cast<const void*>(from), bytes))
MATE_DRIVER_FUNCTION(cuStreamCreate, (CUstream * stream, unsigned), *stream = some<CUstream>())
MATE_DRIVER_FUNCTION(cuStreamDestroy_v2, (CUstream))
MATE_DRIVER_FUNCTION(cuStreamSynchronize, (CUstream))
MATE_DRIVER_FUNCTION(cuStreamGetId, (CUstream, unsigned long long* id), *id = 1)
MATE_DRIVER_FUNCTION(cuStreamIsCapturing, (CUstream, CUstreamCaptureStatus* status),
                     *status = CU_STREAM_CAPTURE_STATUS_NONE)
MATE_DRIVER_FUNCTION(cuThreadExchangeStreamCaptureMode, (CUstreamCaptureMode*))

CUresult cuDeviceGetAttribute(int* value, CUdevice_attribute attribute, CUdevice) {
  switch (attribute) {
    case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR:
      *value = 9;
      break;
    case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR:
      *value = 0;
      break;
    case CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT:
      *value = multiprocessors;
      break;
    case CU_DEVICE_ATTRIBUTE_L2_CACHE_SIZE:
      *value = l2_bytes;
      break;
    default:
      return CUDA_ERROR_INVALID_VALUE;
  }
  return CUDA_SUCCESS;
}

/// A cubin is the path of a shared library, which has the kernel and its entry.
CUresult cuLibraryLoadData(CUlibrary* library, const void* code, int*, void**, unsigned, int*, void**, unsigned) {
  *library = reinterpret_cast<CUlibrary>(dlopen(static_cast<const char*>(code), RTLD_NOW | RTLD_LOCAL));
  if (*library != nullptr) return CUDA_SUCCESS;
  std::fprintf(stderr, "%s\n", dlerror());
  return static_cast<CUresult>(500);
}

CUresult cuLibraryGetKernel(CUkernel* kernel, CUlibrary library, const char*) {
  *kernel = reinterpret_cast<CUkernel>(dlsym(library, "emulator_entry"));
  return *kernel == nullptr ? static_cast<CUresult>(500) : CUDA_SUCCESS;
}

CUresult cuLaunchKernelEx(const CUlaunchConfig* config, CUfunction function, void** arguments, void**) {
  emulator_block_size = {config->blockDimX, config->blockDimY, config->blockDimZ};
  emulator_grid_size = {config->gridDimX, config->gridDimY, config->gridDimZ};
  for (unsigned y = 0; y < config->gridDimY; ++y) {
    for (unsigned x = 0; x < config->gridDimX; ++x) {
      emulator_block = {x, y, 0};
      Block(reinterpret_cast<Kernel>(function), arguments, static_cast<int>(config->blockDimX)).run();
    }
  }
  return CUDA_SUCCESS;
}

CUresult cuTensorMapEncodeTiled(void* map, CUtensorMapDataType type, std::uint32_t rank, void* address,
                                const std::uint64_t* extents, const std::uint64_t* strides, const std::uint32_t* box,
                                const std::uint32_t*, CUtensorMapInterleave, CUtensorMapSwizzle, CUtensorMapL2promotion,
                                CUtensorMapFloatOOBfill) {
  // Maps are copied, and nobody says when they are not needed any more.
  auto* const tensor = new TensorDescription{};
  tensor->data = static_cast<unsigned char*>(address);
  tensor->element_bytes = 1 << static_cast<int>(type);
  tensor->rank = static_cast<int>(rank);
  for (std::uint32_t i = 0; i < rank; ++i) {
    tensor->extents[i] = extents[i];
    tensor->strides[i] = i == 0 ? 0 : strides[i - 1];
    tensor->box[i] = box[i];
  }
  std::memcpy(map, &tensor, sizeof(tensor));
  return CUDA_SUCCESS;
}
}
