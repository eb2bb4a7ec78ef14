// What the compiler's log says of a kernel.
#pragma once

#include <string>
#include <vector>

namespace mate::cuda {

struct CompileLog {
  int registers = 0;    ///< of a thread when the kernel starts
  int stack_bytes = 0;  ///< of a thread
  int spill_bytes = 0;  ///< written to the stack since registers did not suffice
  /// What makes a kernel slow or hang and is only warned of: matrix products that wait for each other, registers that
  /// cannot be moved between warpgroups.
  std::vector<std::string> warnings;

  bool is_clean() const { return stack_bytes == 0 && spill_bytes == 0 && warnings.empty(); }
};

/// Reads the log of compile(). Throws std::runtime_error where it does not tell of registers and spills.
CompileLog read_log(const std::string& log);

}  // namespace mate::cuda
