// The CPU backend: serves every call on any machine, exactly as the contract says.
#pragma once

#include <string>

#include "attention/problem.h"
#include "plan.h"

namespace mate::cpu {

/// Writes the new keys, rotated and rounded to the cache's type, into the cache. The problem's contents are verified.
void append(const Problem& problem, const Plan& plan);

/// Writes out and lse. The problem's contents are verified, and its new keys appended.
void forward(const Problem& problem, const Plan& plan);

/// How forward() of a problem of such head sizes will be planned.
Machine machine(const Problem& problem);

/// Writes out and lse.
void combine(const CombineProblem& problem);

/// The instruction set of the kernels in use, and the number of threads.
std::string describe();

}  // namespace mate::cpu
