// Checks the arguments of a call and makes a Problem of them.
#pragma once

#include <mate/attention.h>

#include <cstdint>
#include <functional>

#include "problem.h"

namespace mate {

/// What the caller calls the arguments whose names differ among the functions, for messages.
struct ArgumentNames {
  const char* q = "q";
  const char* k = "k";
  const char* v = "v";
  const char* k_new = "k_new";
  const char* v_new = "v_new";
  const char* seqused_k = "seqused_k";
};

/// Makes memory of the caller's framework.
using Allocate = std::function<Tensor(DLDataType dtype, DLDevice device, const std::int64_t* shape, int ndim)>;

/// Where a call gets memory from. Either may be empty.
struct Allocators {
  Allocate result;   ///< makes `out` where it is not given
  Allocate scratch;  ///< memory that the call keeps until it has issued its work on the stream
};

/// The calls of mate/attention.h, with the caller's names of the arguments, and where there are some, the caller's
/// allocators. Defined in src/attention.cpp.
void attention(const AttentionArguments& arguments, const ArgumentNames& names, const Allocators& allocators);
void scheduler_metadata(const SchedulerMetadataArguments& arguments, const ArgumentNames& names,
                        const Allocate& allocate);

/// The type of a tensor that is one of ElementType's.
ElementType element_type(DLDataType dtype);

/// Checks everything that the host knows without reading the tensors' memory. The problem's out is absent where it was
/// not given. Throws Error, which names the argument.
Problem make_problem(const AttentionArguments& arguments, const ArgumentNames& names);

/// Gives the problem of a call without out one that `allocate` makes.
void allocate_out(Problem& problem, const AttentionArguments& arguments, const Allocate& allocate);

/// A call of which only the lengths are known: its Problem has no tensors.
Problem make_problem(const SchedulerMetadataArguments& arguments, const ArgumentNames& names);

/// Partial results to be merged.
CombineProblem make_problem(const CombineArguments& arguments);

}  // namespace mate
