#include <limits>
#include <numbers>
#include <vector>

#include "backend.h"
#include "kernels.h"
#include "merge.h"
#include "parallel.h"

namespace mate::cpu {

void combine(const CombineProblem& problem) {
  const Kernels& kernel = kernels();
  const std::int64_t elements =
      std::int64_t{problem.splits} * problem.batch * problem.rows * problem.heads * problem.head_dim_v;
  const std::int64_t tasks = std::int64_t{problem.batch} * problem.rows;
  parallel_for(tasks, workers_for(elements, available_threads()), [&](std::int64_t task) {
    const std::int64_t b = task / problem.rows;
    const std::int64_t row = task % problem.rows;
    std::vector<PartialRow> parts(problem.splits);
    std::vector<float> merged(problem.head_dim_v);
    for (int head = 0; head < problem.heads; ++head) {
      for (int split = 0; split < problem.splits; ++split) {
        const double lse = (&problem.partial_lse.at(b, head, row))[split * problem.lse_split_stride];
        const auto* sums = problem.partial.at<const float>(b, row, head);
        const bool empty = lse == -std::numeric_limits<double>::infinity();
        parts[split] = {empty ? nullptr : sums + split * problem.partial_split_stride, lse * std::numbers::log2e, 1};
      }
      const float lse = merge_row(parts, std::nullopt, problem.head_dim_v, merged.data());
      kernel.narrow(merged.data(), problem.out.type, problem.out.at(b, row, head), problem.head_dim_v);
      if (problem.lse.data != nullptr) problem.lse.at(b, head, row) = lse;
    }
  });
}

}  // namespace mate::cpu
