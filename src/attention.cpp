// The public calls: arguments -> Problem -> Plan -> backend.
#include <mate/attention.h>

#include "attention/arguments.h"
#include "attention/check.h"
#include "attention/contents.h"
#include "attention/plan.h"
#include "cpu/backend.h"

namespace mate {
namespace {

void require_backend(const Tensor& tensor) {
  if (!is_host(tensor.device())) {
    fail(ErrorKind::not_implemented, "MATE has no backend for the device ", DeviceOf{tensor});
  }
}

}  // namespace

void attention(const AttentionArguments& arguments, const ArgumentNames& names, const Allocate& allocate) {
  Problem problem = make_problem(arguments, names);
  require_backend(arguments.q);
  verify_contents(problem, names);
  if (allocate && !arguments.out.given()) {
    allocate_out(problem, arguments, allocate);
  } else {
    check_given("out", arguments.out);
  }
  const Plan plan = make_plan(problem, cpu::machine(problem));
  if (problem.keys.appends) cpu::append(problem, plan);
  cpu::forward(problem, plan);
}

void attention(const AttentionArguments& arguments) { attention(arguments, ArgumentNames{}, nullptr); }

void combine(const CombineArguments& arguments) {
  const CombineProblem problem = make_problem(arguments);
  require_backend(arguments.out_partial);
  cpu::combine(problem);
}

std::int64_t scheduler_metadata_size(std::int64_t batch_size) { return scheduler_metadata_elements(batch_size); }

void scheduler_metadata(const SchedulerMetadataArguments& arguments, const ArgumentNames& names,
                        const Allocate& allocate) {
  const Problem problem = make_problem(arguments, names);
  const Tensor& lengths = arguments.seqused_k.given() ? arguments.seqused_k : arguments.cu_seqlens_k;
  require_backend(lengths);
  verify_contents(problem, names);
  Tensor out = arguments.out;
  if (allocate && !out.given()) {
    const std::int64_t elements = scheduler_metadata_elements(problem.batch);
    out = allocate(int32, lengths.device(), &elements, 1);
    check_place("out", out, names.seqused_k, lengths);
  }
  check_given("out", out);
  const Plan plan = make_plan(problem, cpu::machine(problem));
  for (int b = 0; b < problem.batch; ++b) static_cast<int*>(out.data())[b * out.stride(0)] = plan.splits[b];
}

void scheduler_metadata(const SchedulerMetadataArguments& arguments) {
  scheduler_metadata(arguments, ArgumentNames{}, nullptr);
}

std::string describe_backends() { return "cpu: " + cpu::describe(); }

}  // namespace mate
