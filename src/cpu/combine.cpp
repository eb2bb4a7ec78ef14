#include <numbers>
#include <vector>

#include "backend.h"
#include "kernels.h"
#include "merge.h"
#include "parallel.h"

namespace mate::cpu {

void combine(const CombineProblem& problem) {
  const Kernels& kernel = kernels();
  parallel_for(std::int64_t{problem.batch} * problem.heads, available_threads(), [&](std::int64_t task) {
    const std::int64_t b = task / problem.heads;
    const std::int64_t head = task % problem.heads;
    std::vector<PartialRow> parts(problem.splits);
    std::vector<float> merged(problem.head_dim_v);
    for (int row = 0; row < problem.rows; ++row) {
      for (int split = 0; split < problem.splits; ++split) {
        const double lse = (&problem.partial_lse.at(b, head, row))[split * problem.lse_split_stride];
        const auto* sums = static_cast<const float*>(problem.partial.at(b, row, head));
        parts[split] = {sums + split * problem.partial_split_stride, lse * std::numbers::log2e, 1};
      }
      const float lse = merge_row(parts, std::nullopt, problem.head_dim_v, merged.data());
      kernel.narrow(merged.data(), problem.out.type, problem.out.at(b, row, head), problem.head_dim_v);
      if (problem.lse.data != nullptr) problem.lse.at(b, head, row) = lse;
    }
  });
}

}  // namespace mate::cpu
