#include "kernels.h"

#include <cstdlib>
#include <string>
#include <string_view>
#include <vector>

#include "attention/check.h"
#include "kernels/table.h"

namespace mate::cpu {
namespace {

struct Choice {
  const Kernels* kernels;
  bool runs_here;
};

/// The best first.
std::vector<Choice> choices() {
  std::vector<Choice> choices;
#ifdef __x86_64__
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  choices.push_back({&avx512_bf16_kernels, avx512 && __builtin_cpu_supports("avx512bf16")});
  choices.push_back({&avx512_kernels, avx512});
  choices.push_back({&avx2_kernels, avx2});
#endif
  choices.push_back({&portable_kernels, true});
  return choices;
}

const Kernels& choose_kernels() {
  const char* variable = std::getenv("MATE_CPU_ISA");
  const std::string_view wanted = variable == nullptr ? "" : variable;
  std::string names;
  bool known = false;
  for (const Choice& choice : choices()) {
    known = known || choice.kernels->name == wanted;
    if (!choice.runs_here) continue;
    if (wanted.empty() || choice.kernels->name == wanted) return *choice.kernels;
    names += (names.empty() ? "" : ", ") + std::string(choice.kernels->name);
  }
  fail(ErrorKind::value, "MATE_CPU_ISA: ", known ? "this processor lacks " : "there is no instruction set ", wanted,
       "; it has ", names);
}

}  // namespace

const Kernels& kernels() {
  static const Kernels& chosen = choose_kernels();
  return chosen;
}

}  // namespace mate::cpu
