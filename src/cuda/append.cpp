// Chooses and prepares the kernel that appends to a cache.
#include "append.h"

#include <algorithm>
#include <cstdint>

#include "variants.h"

namespace mate::cuda {
namespace {

KernelFamily& append_kernels() {
  static KernelFamily kernels;
  return kernels;
}

}  // namespace

Append::Append(Problem& p, const Device& gpu, CUstream stream, Scratch& scratch) {
  std::int64_t rows = std::int64_t{p.keys.new_rows} * p.heads_k;
  if (p.rotary.given()) {
    const int multiple = 16 / bytes_of(p.q.type);  // rows are aligned to 16 bytes
    Rows& q = arguments_.rotated_q;
    q.type = p.q.type;
    q.head_stride = (p.head_dim + multiple - 1) / multiple * multiple;
    q.row_stride = q.head_stride * p.heads_q;
    q.slot_stride = q.row_stride * p.queries.rows;
    q.data = scratch.take<std::byte>(q.slot_stride * p.query_slots() * bytes_of(q.type));
    rows += std::int64_t{p.queries.rows} * p.heads_q;
  }
  arguments_.problem = p;
  constexpr int threads = 128;
  constexpr int most_blocks = 1024;           // of a sequence
  constexpr std::int64_t most_rows = 65'535;  // of a grid: each goes on to further sequences
  const AppendTypes types{p.q.type, p.k_new.type, p.k.type};
  const auto key = static_cast<std::uint64_t>(types.query) << 4 | static_cast<std::uint64_t>(types.added) << 2 |
                   static_cast<std::uint64_t>(types.key);
  kernel_ = append_kernels().load(gpu, key, [&] { return append_source(types); });
  const std::int64_t blocks = (rows + threads / 32 - 1) / (threads / 32);
  shape_.grid = {static_cast<unsigned>(std::clamp<std::int64_t>(blocks, 1, most_blocks)),
                 static_cast<unsigned>(std::min<std::int64_t>(p.batch, most_rows))};
  shape_.block = {threads};
  shape_.stream = stream;
  if (p.rotary.given()) p.q = arguments_.rotated_q;
}

}  // namespace mate::cuda
