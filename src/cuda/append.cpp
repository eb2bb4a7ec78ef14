// Launches the kernel that appends to a cache.
#include "append.h"

#include <algorithm>
#include <cstdint>

#include "attention/check.h"
#include "kernel_library.h"
#include "kernels/append_arguments.h"
#include "variants.h"

namespace mate::cuda {
namespace {

KernelFamily& append_kernels() {
  static KernelFamily kernels;
  return kernels;
}

}  // namespace

void append(Problem& p, const Device& gpu, CUstream stream, Scratch& scratch) {
  AppendArguments arguments;
  std::int64_t rows = std::int64_t{p.keys.new_rows} * p.heads_k;
  if (p.rotary.given()) {
    const int multiple = 16 / bytes_of(p.q.type);  // rows are aligned to 16 bytes
    Rows& q = arguments.rotated_q;
    q.type = p.q.type;
    q.head_stride = (p.head_dim + multiple - 1) / multiple * multiple;
    q.row_stride = q.head_stride * p.heads_q;
    q.slot_stride = q.row_stride * p.queries.rows;
    q.data = scratch.take<std::byte>(q.slot_stride * p.query_slots() * bytes_of(q.type));
    rows += std::int64_t{p.queries.rows} * p.heads_q;
  }
  arguments.problem = p;
  constexpr int threads = 128;
  constexpr int most_blocks = 1024;  // of a sequence
  const AppendTypes types{p.q.type, p.k_new.type, p.k.type};
  const auto key = static_cast<std::uint64_t>(types.query) << 4 | static_cast<std::uint64_t>(types.added) << 2 |
                   static_cast<std::uint64_t>(types.key);
  const Kernel kernel = append_kernels().load(gpu, key, [&] { return append_source(types); });
  const std::int64_t blocks = (rows + threads / 32 - 1) / (threads / 32);
  // A grid has at most 2**16 - 1 rows.
  constexpr int most_sequences = 65'535;
  require(p.batch <= most_sequences, "k_new must be appended to at most ", most_sequences, " sequences, got ", p.batch);
  const Launch shape{
      .grid = {static_cast<unsigned>(std::clamp<std::int64_t>(blocks, 1, most_blocks)), static_cast<unsigned>(p.batch)},
      .block = {threads},
      .stream = stream};
  launch(kernel, shape, arguments);
  if (p.rotary.given()) p.q = arguments.rotated_q;
}

}  // namespace mate::cuda
