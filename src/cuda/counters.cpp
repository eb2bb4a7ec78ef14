#include "counters.h"

#include <mutex>
#include <shared_mutex>
#include <unordered_map>

namespace mate::cuda {
namespace {

constexpr int calls_per_chunk = 256;
constexpr int chunk_ints = calls_per_chunk * counters_of_call;

/// Zeros in new memory of the current context.
int* allocate_chunk() {
  const Driver& cuda = driver();
  const AllowDuringCapture allow;
  CUdeviceptr chunk = 0;
  cuda.cuMemAlloc(&chunk, chunk_ints * sizeof(int));
  // On a stream of its own: the default stream would wait for others, and cannot be used while some are captured.
  CUstream stream = nullptr;
  cuda.cuStreamCreate(&stream, CU_STREAM_NON_BLOCKING);
  cuda.cuMemsetD32Async(chunk, 0, chunk_ints, stream);
  cuda.cuStreamSynchronize(stream);
  cuda.cuStreamDestroy(stream);
  return reinterpret_cast<int*>(chunk);
}

/// What is left of a context's newest chunk.
struct Chunk {
  int* next = nullptr;
  int left = 0;

  int* take() {
    if (left == 0) {
      next = allocate_chunk();
      left = calls_per_chunk;
    }
    --left;
    int* const taken = next;
    next += counters_of_call;
    return taken;
  }
};

class Pool {
 public:
  int* of_stream(CUstream stream) {
    unsigned long long id =
        0;  // unlike the handle, never used again, and that of a thread's own default stream differs
    driver().cuStreamGetId(stream, &id);
    {
      const std::shared_lock lock(mutex_);
      const auto found = streams_.find(id);
      if (found != streams_.end()) return found->second;
    }
    int* const counters = fresh();
    const std::unique_lock lock(mutex_);
    return streams_.emplace(id, counters).first->second;
  }

  int* fresh() {
    unsigned long long context = 0;
    driver().cuCtxGetId(nullptr, &context);
    const std::unique_lock lock(mutex_);
    return chunks_[context].take();
  }

 private:
  std::shared_mutex mutex_;
  std::unordered_map<unsigned long long, int*> streams_;
  std::unordered_map<unsigned long long, Chunk> chunks_;
};

}  // namespace

int* counters(CUstream stream) {
  static Pool pool;
  CUstreamCaptureStatus status = CU_STREAM_CAPTURE_STATUS_NONE;
  driver().cuStreamIsCapturing(stream, &status);
  return status == CU_STREAM_CAPTURE_STATUS_NONE ? pool.of_stream(stream) : pool.fresh();
}

}  // namespace mate::cuda
