// Verifies lengths, offsets and page indices that lie in a device's memory.
#include "attention/contents.h"

#include <deque>
#include <vector>

#include "attention/tiling.h"
#include "backend.h"
#include "device.h"

namespace mate::cuda {
namespace {

/// Copies of a device's integers in memory of the host, once the stream has come so far.
class Copies {
 public:
  explicit Copies(CUstream stream) : stream_(stream) {}

  const int* copy(const int* source, long long count) {
    std::vector<int>& copied = copies_.emplace_back(count);
    if (count > 0) {
      driver().cuMemcpyDtoHAsync(copied.data(), reinterpret_cast<CUdeviceptr>(source), count * sizeof(int), stream_);
    }
    return copied.data();
  }

  void copy(IntVector& vector, int size) {
    if (vector.given()) vector.data = copy(vector.data, size == 0 ? 0 : (size - 1) * vector.stride + 1);
  }

 private:
  CUstream stream_;
  std::deque<std::vector<int>> copies_;
};

}  // namespace

void verify_contents(const Problem& problem, const ArgumentNames& names, int device_id, void* stream) {
  const auto queue = static_cast<CUstream>(stream);
  const Driver& cuda = driver();
  const CurrentContext context(device(device_id));
  CUstreamCaptureStatus status = CU_STREAM_CAPTURE_STATUS_NONE;
  cuda.cuStreamIsCapturing(queue, &status);
  if (status != CU_STREAM_CAPTURE_STATUS_NONE) return;

  Problem on_host = problem;
  KeyLayout& keys = on_host.keys;
  Copies copies(queue);
  for (IntVector* offsets : {&on_host.queries.cu_seqlens, &keys.cu_seqlens, &keys.cu_seqlens_new}) {
    copies.copy(*offsets, problem.batch + 1);
  }
  for (IntVector* lengths : {&on_host.queries.seqused, &keys.seqused, &keys.batch_index, &keys.leftpad,
                             &keys.rotary_seqlens, &keys.cp_total}) {
    copies.copy(*lengths, problem.batch);
  }
  if (keys.paged() && keys.page_rows > 0 && keys.table_capacity > 0) {
    const std::int64_t pages = divide_up(keys.table_capacity, keys.rows);
    keys.page_table = copies.copy(keys.page_table, (keys.page_rows - 1) * keys.page_table_stride + pages);
  }
  cuda.cuStreamSynchronize(queue);
  mate::verify_contents(on_host, names);
}

}  // namespace mate::cuda
