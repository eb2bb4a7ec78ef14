// A CUDA driver (libcuda.so.1) whose one GPU is the CPU: memory is the process's own, and kernels are what compiler.cpp
// has made of them. The clusters of a grid, most of them of one block, run one after another, the threads of a cluster
// in turns, each until it waits.
#include "cuda/driver.h"

#include <dlfcn.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <vector>

#include "cuda/kernels/forward_variant.h"
#include "device.h"
#include "tensor_description.h"

using namespace emulator;
using namespace mate::cuda;

extern "C" {
Index emulator::emulator_thread, emulator::emulator_block, emulator::emulator_block_size, emulator::emulator_grid_size;
int emulator::emulator_block_of_cluster;
int emulator::emulator_blocks_of_cluster;
}

namespace mate::cuda {
alignas(1024) unsigned char memory[most_shared_bytes];
}

namespace {

using Kernel = void (*)(void** arguments);

constexpr int multiprocessors = 12;
constexpr int l2_bytes = 50 << 20;

/// A cluster of blocks of threads while it runs.
class Cluster {
 public:
  Cluster(Kernel kernel, void** arguments, Index first_block, int blocks, int threads)
      : kernel_(kernel), arguments_(arguments), first_block_(first_block) {
    for (int i = 0; i < blocks; ++i) blocks_.emplace_back(threads);
  }

  void run() {
    running_ = this;
    left_ = 0;
    for (current_ = 0; current_ < static_cast<int>(blocks_.size()); ++current_) {
      for (int i = 0; i < static_cast<int>(block().threads.size()); ++i) start(i);
    }
    for (int idle_rounds = 0; left_ > 0; ++idle_rounds) {
      if (idle_rounds > most_idle_rounds) die("threads wait for each other");
      for (current_ = 0; current_ < static_cast<int>(blocks_.size()); ++current_) {
        if (blocks_.size() == 1 || !is_held()) run_block();
      }
      if (std::exchange(moved_, false)) idle_rounds = 0;
    }
  }

  void yield() { swapcontext(&block().threads[block().current].context, &scheduler_); }

  const Parcel* exchange(const Parcel& mine) {
    const int thread = block().current;
    Warp& warp = block().warps[thread / warp_lanes];
    const unsigned round = warp.round;
    Parcel* const parcels = warp.parcels[round % 2];
    parcels[thread % warp_lanes] = mine;
    if (++warp.arrived == warp_lanes) {
      warp.arrived = 0;
      ++warp.round;
      moved_ = true;
    }
    while (warp.round == round) yield();
    return parcels;
  }

  void arrive(int id, int threads, bool waits) { arrive(block().barriers[id], threads, waits); }
  void sync() { arrive(all_, static_cast<int>(blocks_.size() * block().threads.size()), true); }

  unsigned char* memory_of(int number) { return number == current_ ? memory : blocks_[number].memory.data(); }

  static Cluster& running() { return *running_; }

 private:
  static constexpr int most_idle_rounds = 10000;
  static constexpr std::size_t stack_bytes = 256 * 1024;
  static constexpr int most_threads = 1024;
  static constexpr int most_blocks = 8;

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
  struct Block {
    std::vector<Thread> threads;
    std::vector<Warp> warps;
    Barrier barriers[first_warpgroup_barrier + most_threads / 128];
    std::vector<unsigned char> memory;  ///< while another block of the cluster runs
    int current = 0;                    ///< thread
    int held = 0;                       ///< turns that it still waits

    explicit Block(int count)
        : threads(count), warps((count + warp_lanes - 1) / warp_lanes), memory(sizeof(mate::cuda::memory)) {}
  };

  Block& block() { return blocks_[current_]; }

  void start(int thread) {
    static char* const stacks =
        static_cast<char*>(mmap(nullptr, stack_bytes * most_threads * most_blocks, PROT_READ | PROT_WRITE,
                                MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
    ucontext_t& context = block().threads[thread].context;
    getcontext(&context);
    context.uc_stack.ss_sp = stacks + stack_bytes * (most_threads * current_ + thread);
    context.uc_stack.ss_size = stack_bytes;
    context.uc_link = nullptr;
    makecontext(
        &context, [] { running_->run_thread(); }, 0);
    ++left_;
  }

  /// Whether the current block waits while others of its cluster run: at random, for some turns.
  bool is_held() {
    constexpr int most_turns = 40;
    constexpr int turns_between = 100;  // on average
    if (block().held > 0) {
      --block().held;
    } else if (random_() % turns_between == 0) {
      block().held = static_cast<int>(random_() % most_turns);
    }
    return block().held > 0;
  }

  /// Runs each thread of the current block until it waits.
  void run_block() {
    const bool swaps = blocks_.size() > 1;
    if (swaps) std::memcpy(memory, block().memory.data(), sizeof(memory));
    emulator_block = first_block_;
    emulator_block.x += static_cast<unsigned>(current_);
    emulator_block_of_cluster = current_;
    emulator_blocks_of_cluster = static_cast<int>(blocks_.size());
    for (int i = 0; i < static_cast<int>(block().threads.size()); ++i) {
      Thread& thread = block().threads[i];
      if (thread.ended) continue;
      block().current = i;
      emulator_thread = {static_cast<unsigned>(i), 0, 0};
      swapcontext(&scheduler_, &thread.context);
    }
    if (swaps) std::memcpy(block().memory.data(), memory, sizeof(memory));
  }

  void run_thread() {
    kernel_(arguments_);
    block().threads[block().current].ended = true;
    --left_;
    moved_ = true;
    yield();
  }

  void arrive(Barrier& barrier, int threads, bool waits) {
    const unsigned round = barrier.round;
    if (++barrier.arrived == threads) {
      barrier.arrived = 0;
      ++barrier.round;
      moved_ = true;
    }
    while (waits && barrier.round == round) yield();
  }

  [[noreturn]] void die(const char* reason) const {
    std::fprintf(stderr, "block %u of %u: %s; those of warps", first_block_.x, emulator_grid_size.x, reason);
    for (const Block& block : blocks_) {
      for (std::size_t i = 0; i < block.threads.size(); i += warp_lanes) {
        if (!block.threads[i].ended) std::fprintf(stderr, " %zu", i / warp_lanes);
      }
      std::fprintf(stderr, ";");
    }
    std::fprintf(stderr, "\n");
    std::abort();
  }

  static Cluster* running_;
  static inline std::minstd_rand random_;

  Kernel kernel_;
  void** arguments_;
  Index first_block_;
  std::vector<Block> blocks_;
  Barrier all_;
  ucontext_t scheduler_{};
  int current_ = 0;     ///< block
  int left_ = 0;        ///< threads
  bool moved_ = false;  ///< something that others may wait for
};

Cluster* Cluster::running_ = nullptr;

/// What handles point to: nothing looks there.
int anything;

template <typename Handle>
Handle some() {
  return reinterpret_cast<Handle>(&anything);
}

}  // namespace

extern "C" {

void emulator::emulator_yield() { Cluster::running().yield(); }
const Parcel* emulator::emulator_exchange(const Parcel* mine) { return Cluster::running().exchange(*mine); }
void emulator::emulator_arrive(int barrier, int threads, bool waits) {
  Cluster::running().arrive(barrier, threads, waits);
}
void emulator::emulator_cluster_sync() { Cluster::running().sync(); }
unsigned char* emulator::emulator_memory_of(int block) { return Cluster::running().memory_of(block); }

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
  unsigned blocks = 1;  // of a cluster
  for (unsigned i = 0; i < config->numAttrs; ++i) {
    if (config->attrs[i].id == CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION) blocks = config->attrs[i].value.clusterDim.x;
  }
  if (config->gridDimX % blocks != 0) return CUDA_ERROR_INVALID_VALUE;
  for (unsigned y = 0; y < config->gridDimY; ++y) {
    for (unsigned x = 0; x < config->gridDimX; x += blocks) {
      Cluster(reinterpret_cast<Kernel>(function), arguments, {x, y, 0}, static_cast<int>(blocks),
              static_cast<int>(config->blockDimX))
          .run();
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
