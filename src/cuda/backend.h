// The NVIDIA backend: every call on tensors of a Hopper GPU (compute capability 9.0).
#pragma once

#include "attention/arguments.h"
#include "attention/problem.h"

namespace mate::cuda {

/// Throws Error (not_implemented) for a call that this backend does not serve, and says what and why.
void require_served(const Problem& problem, int device);

/// Checks what the tensors hold, as verify_contents() of attention/contents.h does, on copies; waits for the stream. A
/// stream that captures a graph has nothing to be read yet: nothing is checked then.
void verify_contents(const Problem& problem, const ArgumentNames& names, int device, void* stream);

/// Computes out and lse, and clears rows past a length, on a stream (CUstream) of a device; does not wait for them.
/// `allocate`, where there is one, gives memory that later work on the same stream may use again once it is let go.
void forward(const Problem& problem, int device, void* stream, const Allocate& allocate);

/// Writes out and lse of partial results on a stream.
void combine(const CombineProblem& problem, int device, void* stream);

/// Writes about how many steps of work each sequence of a call takes. forward() does not read it.
void scheduler_metadata(const Problem& problem, int device, void* stream, int* out, std::int64_t stride);

}  // namespace mate::cuda
