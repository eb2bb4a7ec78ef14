#include "compile_log.h"

#include <charconv>
#include <sstream>
#include <stdexcept>
#include <string_view>

#include "attention/check.h"

namespace mate::cuda {
namespace {

/// The number right before `after`.
int number_before(const std::string& log, std::string_view after) {
  const std::size_t end = log.find(after);
  std::size_t begin = end == std::string::npos ? 0 : end;
  while (begin > 0 && log[begin - 1] >= '0' && log[begin - 1] <= '9') --begin;
  int number = 0;
  if (end == std::string::npos || std::from_chars(&log[begin], &log[end], number).ec != std::errc{}) {
    throw std::runtime_error(join("the compiler's log has no number of", after, ":\n", log));
  }
  return number;
}

}  // namespace

CompileLog read_log(const std::string& log) {
  CompileLog read;
  read.registers = number_before(log, " registers, used");
  read.stack_bytes = number_before(log, " bytes stack frame");
  read.spill_bytes = number_before(log, " bytes spill stores");
  std::istringstream lines(log);
  for (std::string line; std::getline(lines, line);) {
    // Their numbers differ from one compiler to the next: C7508, C7510, C7511, C7512.
    if (line.find("Potential Performance Loss") != std::string::npos) read.warnings.push_back(line);
  }
  return read;
}

}  // namespace mate::cuda
