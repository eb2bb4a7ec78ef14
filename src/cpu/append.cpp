#include <algorithm>
#include <cstring>

#include "backend.h"
#include "kernels.h"
#include "parallel.h"
#include "rotate.h"

namespace mate::cpu {
namespace {

// New rows of one sequence that make a task.
constexpr int rows_of_task = 64;

/// Writes one new row: as it is, unless it is rotated or its type changes.
void write_row(const Kernels& kernels, const void* source, ElementType source_type, const Rotary* rotary,
               std::int64_t position, float descale, ElementType type, void* target, int width) {
  if (rotary == nullptr && source_type == type) {
    std::memcpy(target, source, std::size_t(width) * bytes_of(type));
    return;
  }
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
  const double elements =
      double(problem.batch) * problem.keys.new_rows * problem.heads_k * (problem.head_dim + problem.head_dim_v);
  const Rotary* rotary = problem.rotary.given() ? &problem.rotary : nullptr;
  const bool packed = problem.keys.cu_seqlens_new.given();
  const std::int64_t tasks_of_sequence = divide_up(problem.keys.new_rows, rows_of_task);
  parallel_for(problem.batch * tasks_of_sequence, workers_for(elements, plan.workers), [&](std::int64_t task) {
    const int b = static_cast<int>(task / tasks_of_sequence);
    const int first = static_cast<int>(task % tasks_of_sequence) * rows_of_task;
    const Sequence sequence = problem.sequence(b);
    const int new_slot = packed ? 0 : b;
    for (int t = first; t < std::min(sequence.new_keys, first + rows_of_task); ++t) {
      const Location to = locate_position(problem.keys, sequence, sequence.append_at + t);
      const int from = sequence.first_new + t;
      for (int head = 0; head < problem.heads_k; ++head) {
        write_row(kernel, problem.k_new.at(new_slot, from, head), problem.k_new.type, rotary,
                  std::int64_t{sequence.rotary_base} + t, problem.k_descale.at(b, head), problem.k.type,
                  problem.k.at(to.slot, to.row, head), problem.head_dim);
        write_row(kernel, problem.v_new.at(new_slot, from, head), problem.v_new.type, nullptr, 0,
                  problem.v_descale.at(b, head), problem.v.type, problem.v.at(to.slot, to.row, head),
                  problem.head_dim_v);
      }
    }
  });
}

}  // namespace mate::cpu
