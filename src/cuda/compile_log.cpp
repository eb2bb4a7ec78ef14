#include "compile_log.h"

#include <regex>
#include <stdexcept>

#include "attention/check.h"

namespace mate::cuda {
namespace {

int number_in(const std::string& log, const char* pattern) {
  std::smatch match;
  if (!std::regex_search(log, match, std::regex(pattern))) {
    throw std::runtime_error(join("the compiler's log has nothing like '", pattern, "':\n", log));
  }
  return std::stoi(match[1]);
}

}  // namespace

CompileLog read_log(const std::string& log) {
  CompileLog read;
  read.registers = number_in(log, "Used ([0-9]+) registers");
  read.stack_bytes = number_in(log, "([0-9]+) bytes stack frame");
  read.spill_bytes = number_in(log, "([0-9]+) bytes spill stores");
  // Its numbers differ from one compiler to the next: C7508, C7510, C7511, C7512.
  const std::regex warning("[^\n]*Potential Performance Loss[^\n]*");
  for (auto found = std::sregex_iterator(log.begin(), log.end(), warning); found != std::sregex_iterator(); ++found) {
    read.warnings.push_back(found->str());
  }
  return read;
}

}  // namespace mate::cuda
