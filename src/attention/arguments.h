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

/// The names of flash_attn_with_kvcache and get_scheduler_metadata.
inline constexpr ArgumentNames cache_argument_names{"q", "k_cache", "v_cache", "k", "v", "cache_seqlens"};

/// The names of flash_attn_qkvpacked_func.
inline constexpr ArgumentNames packed_argument_names{"qkv", "qkv", "qkv"};

/// Makes the memory of a result that the caller did not give.
using Allocate = std::function<Tensor(DLDataType dtype, const std::int64_t* shape, int ndim)>;

/// As the functions of the same name in mate/attention.h, with the caller's names of the arguments.
/// `allocate`, where there is one, makes `out` where it is not given.
void attention(const AttentionArguments& arguments, const ArgumentNames& names, const Allocate& allocate = nullptr);
void scheduler_metadata(const SchedulerMetadataArguments& arguments, const ArgumentNames& names);

/// Checks everything that the host knows without reading the tensors' memory. Throws Error, which names the argument.
Problem make_problem(const AttentionArguments& arguments, const ArgumentNames& names,
                     const Allocate& allocate = nullptr);

/// The same of a call for which only the lengths are known.
Problem make_problem(const SchedulerMetadataArguments& arguments, const ArgumentNames& names);

/// Checks what the tensors hold, which must be memory that the host can read: lengths, page indices, and that no two
/// sequences append to the same place. Throws Error, which names the argument and the sequence.
void verify_contents(const Problem& problem, const ArgumentNames& names);

/// Whether MATE_CHECK=1 is set: each call verifies all that it reads.
bool checks_requested();

/// The same of partial results to be merged.
CombineProblem make_problem(const CombineArguments& arguments);

}  // namespace mate
