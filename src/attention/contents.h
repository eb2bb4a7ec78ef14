// What only the tensors' memory tells: lengths, offsets and page indices.
#pragma once

#include "arguments.h"

namespace mate {

/// Whether MATE_CHECK=1 is set: a call on a GPU then waits for what the tensors hold, and verifies that too.
bool checks_requested();

/// Checks what the tensors hold, which must be memory that the host can read: lengths, page indices, and that no two
/// sequences append to the same place; with MATE_CHECK=1 also that the rotary table reaches every position. Throws
/// Error, which names the argument and the sequence.
void verify_contents(const Problem& problem, const ArgumentNames& names);

}  // namespace mate
