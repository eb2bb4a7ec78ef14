#include "backend.h"
#include "kernels.h"
#include "parallel.h"
#include "rotate.h"

namespace mate::cpu {
namespace {

constexpr int max_head_dim = 512;
// Below this many elements one thread is done before others have started.
constexpr std::int64_t min_parallel_elements = 1 << 15;

/// Writes one new row: as it is, unless it is rotated or its type changes.
void write_row(const Kernels& kernels, const void* source, ElementType source_type, const Rotary* rotary,
               std::int64_t position, float descale, ElementType type, void* target, int width) {
  float row[max_head_dim];
  float scratch[max_head_dim];
  kernels.widen(source_type, source, 1, row, width);
  if (rotary != nullptr) rotate(*rotary, position, kernels, row, scratch);
  // Rows in the queries' type over an e4m3 cache are quantised; rows of the cache's own type keep their scale.
  if (source_type != type) {
    for (int i = 0; i < width; ++i) row[i] /= descale;
  }
  kernels.narrow(row, type, target, width);
}

}  // namespace

void append(const Problem& problem, const Plan& plan) {
  const Kernels& kernel = kernels();
  const std::int64_t elements =
      std::int64_t{problem.batch} * problem.keys.new_rows * problem.heads_k * (problem.head_dim + problem.head_dim_v);
  const int workers = elements < min_parallel_elements ? 1 : plan.workers;
  const Rotary* rotary = problem.rotary.given() ? &problem.rotary : nullptr;
  const bool packed = problem.keys.cu_seqlens_new.given();
  parallel_for(std::int64_t{problem.batch} * problem.heads_k, workers, [&](std::int64_t task) {
    const int b = static_cast<int>(task / problem.heads_k);
    const int head = static_cast<int>(task % problem.heads_k);
    const Sequence sequence = problem.sequence(b);
    const int new_slot = packed ? 0 : b;
    for (int t = 0; t < sequence.new_keys; ++t) {
      const Location to = locate_position(problem.keys, sequence, std::int64_t{sequence.append_at} + t);
      const int from = sequence.first_new + t;
      write_row(kernel, problem.k_new.at(new_slot, from, head), problem.k_new.type, rotary,
                std::int64_t{sequence.rotary_base} + t, problem.k_descale.at(b, head), problem.k.type,
                problem.k.at(to.slot, to.row, head), problem.head_dim);
      write_row(kernel, problem.v_new.at(new_slot, from, head), problem.v_new.type, nullptr, 0,
                problem.v_descale.at(b, head), problem.v.type, problem.v.at(to.slot, to.row, head), problem.head_dim_v);
    }
  });
}

}  // namespace mate::cpu
