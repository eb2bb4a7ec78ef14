// The public calls: arguments -> Problem -> Plan -> backend.
#include <mate/attention.h>

#include "attention/arguments.h"
#include "attention/check.h"
#include "attention/plan.h"
#include "cpu/backend.h"

namespace mate {
namespace {

void require_backend(const Tensor& tensor) {
  if (tensor.device().device_type != kDLCPU) {
    fail(ErrorKind::not_implemented, "MATE has no backend for the device ", DeviceOf{tensor},
         ": tensors must be on the CPU");
  }
}

}  // namespace

void attention(const AttentionArguments& arguments, const ArgumentNames& names, const Allocate& allocate) {
  const Problem problem = make_problem(arguments, names, allocate);
  require_backend(arguments.q);
  verify_contents(problem, names);
  const Plan plan = make_plan(problem, cpu::machine());
  if (problem.keys.appends) cpu::append(problem, plan);
  cpu::forward(problem, plan);
}

void attention(const AttentionArguments& arguments) { attention(arguments, ArgumentNames{}); }

void combine(const CombineArguments& arguments) {
  const CombineProblem problem = make_problem(arguments);
  require_backend(arguments.out_partial);
  cpu::combine(problem);
}

std::int64_t scheduler_metadata_size(std::int64_t batch_size) { return scheduler_metadata_elements(batch_size); }

void scheduler_metadata(const SchedulerMetadataArguments& arguments, const ArgumentNames& names) {
  const Problem problem = make_problem(arguments, names);
  require_backend(arguments.out);
  verify_contents(problem, names);
  const Plan plan = make_plan(problem, cpu::machine());
  int* out = static_cast<int*>(arguments.out.data());
  for (int b = 0; b < problem.batch; ++b) out[b * arguments.out.stride(0)] = plan.splits[b];
}

void scheduler_metadata(const SchedulerMetadataArguments& arguments) { scheduler_metadata(arguments, ArgumentNames{}); }

std::string describe_backends() { return "cpu: " + cpu::describe(); }

}  // namespace mate
