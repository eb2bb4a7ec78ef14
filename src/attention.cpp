// The public calls: arguments -> Problem -> backend.
#include <mate/attention.h>

#include "attention/arguments.h"
#include "attention/check.h"
#include "attention/contents.h"
#include "cpu/backend.h"
#include "cuda/backend.h"
#include "cuda/device.h"

namespace mate {
namespace {

bool is_cuda(const Tensor& tensor) { return tensor.device().device_type == kDLCUDA; }

void require_host(const Tensor& tensor) {
  if (!is_host(tensor.device())) {
    fail(ErrorKind::not_implemented, "MATE has no backend for this call on the device ", DeviceOf{tensor});
  }
}

}  // namespace

void attention(const AttentionArguments& arguments, const ArgumentNames& names, const Allocators& allocators) {
  Problem problem = make_problem(arguments, names);
  const int device = arguments.q.device().device_id;
  if (is_cuda(arguments.q)) {
    cuda::require_served(problem, device);
    if (checks_requested()) cuda::verify_contents(problem, names, device, arguments.stream);
  } else {
    require_host(arguments.q);
    verify_contents(problem, names);
  }
  if (allocators.result && !arguments.out.given()) {
    allocate_out(problem, arguments, allocators.result);
  } else {
    check_given("out", arguments.out);
  }
  if (is_cuda(arguments.q)) {
    cuda::forward(problem, device, arguments.stream, allocators.scratch);
    return;
  }
  const Plan plan = make_plan(problem, cpu::machine(problem));
  if (problem.keys.appends) cpu::append(problem, plan);
  cpu::forward(problem, plan);
}

void attention(const AttentionArguments& arguments) { attention(arguments, ArgumentNames{}, {}); }

void combine(const CombineArguments& arguments) {
  const CombineProblem problem = make_problem(arguments);
  if (is_cuda(arguments.out_partial)) {
    cuda::combine(problem, arguments.out_partial.device().device_id, arguments.stream);
    return;
  }
  require_host(arguments.out_partial);
  cpu::combine(problem);
}

// A number for each sequence: see docs/design.md.
std::int64_t scheduler_metadata_size(std::int64_t batch_size) { return batch_size; }

void scheduler_metadata(const SchedulerMetadataArguments& arguments, const ArgumentNames& names,
                        const Allocate& allocate) {
  const Problem problem = make_problem(arguments, names);
  const Tensor& lengths = arguments.seqused_k.given() ? arguments.seqused_k : arguments.cu_seqlens_k;
  const int device = lengths.device().device_id;
  if (!is_cuda(lengths)) {
    require_host(lengths);
    verify_contents(problem, names);
  } else if (checks_requested()) {
    cuda::verify_contents(problem, names, device, arguments.stream);
  }
  Tensor out = arguments.out;
  if (allocate && !out.given()) {
    const std::int64_t elements = scheduler_metadata_size(problem.batch);
    out = allocate(int32, lengths.device(), &elements, 1);
    check_place("out", out, names.seqused_k, lengths);
  }
  check_given("out", out);
  auto* const numbers = static_cast<int*>(out.data());
  if (is_cuda(lengths)) {
    cuda::scheduler_metadata(problem, device, arguments.stream, numbers, out.stride(0));
    return;
  }
  const Plan plan = make_plan(problem, cpu::machine(problem));
  for (int b = 0; b < problem.batch; ++b) numbers[b * out.stride(0)] = plan.splits[b];
}

void scheduler_metadata(const SchedulerMetadataArguments& arguments) {
  scheduler_metadata(arguments, ArgumentNames{}, nullptr);
}

std::string describe_backends() { return "cpu: " + cpu::describe() + "\ncuda: " + cuda::describe(); }

}  // namespace mate
