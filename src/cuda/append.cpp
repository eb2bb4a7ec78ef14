// Chooses and prepares the kernel that appends to a cache.
#include "append.h"

#include <cstdint>

#include "attention/check.h"
#include "attention/tiling.h"
#include "variants.h"

namespace mate::cuda {

Append::Append(Problem& p, const Device& gpu, CUstream stream, Scratch& scratch) {
  const int slots_of_new = p.keys.cu_seqlens_new.given() ? 1 : p.batch;
  const std::int64_t new_rows = std::int64_t{p.keys.new_rows} * slots_of_new;
  require(new_rows <= max_length, "k must have fewer than 2**31 rows, got ", new_rows);
  std::int64_t rows = new_rows * p.heads_k;
  if (p.rotary.given()) {
    const int multiple = 16 / bytes_of(p.q.type);  // rows are aligned to 16 bytes
    Rows& q = arguments_.rotated_q;
    q.type = p.q.type;
    q.head_stride = divide_up(p.head_dim, multiple) * multiple;
    q.row_stride = q.head_stride * p.heads_q;
    q.slot_stride = q.row_stride * p.queries.rows;
    q.data = scratch.take<std::byte>(q.slot_stride * p.query_slots() * bytes_of(q.type));
    const std::int64_t query_rows = std::int64_t{p.queries.rows} * p.query_slots();
    require(query_rows <= max_length, "q must have fewer than 2**31 rows, got ", query_rows);
    rows += query_rows * p.heads_q;
  }
  arguments_.problem = p;
  constexpr int warps = append_threads / 32;
  constexpr int most_blocks = 16 * 1024;
  const AppendTypes types{p.q.type, p.k_new.type, p.k.type};
  const auto key = static_cast<std::uint64_t>(types.query) << 4 | static_cast<std::uint64_t>(types.added) << 2 |
                   static_cast<std::uint64_t>(types.key);
  kernel_ = kernels_of<append_source>().load(gpu, key, [&] { return append_source(types); });
  shape_.grid = {static_cast<unsigned>(clamp(divide_up(rows, warps), 1, most_blocks))};
  shape_.block = {append_threads};
  shape_.stream = stream;
  if (p.rotary.given()) p.q = arguments_.rotated_q;
}

}  // namespace mate::cuda
