// One prefill call or one decode call of the CPU backend, many times over: what to profile, and what to count
// instructions of.
//
//   cpu_calls prefill|decode [float32|bfloat16|float16|float8] [repeats [heads_q heads_k keys head_dim page_size]]
//
// Prefill is causal, with as many queries as keys, and contiguous; decode has one query, and pages in random order
// unless page_size is 0. Prints the best time of the repeats, and GFLOP/s or GB/s of keys and values.
#include <mate/attention.h>

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <numeric>
#include <random>
#include <string>
#include <vector>

namespace {

struct Case {
  bool prefill = true;
  DLDataType type = mate::float32;
  int repeats = 1;
  int heads_q = 8;
  int heads_k = 2;
  int keys = 512;
  int head_dim = 128;
  int page_size = 16;

  int queries() const { return prefill ? keys : 1; }
  int bytes_of_number() const { return type.bits / 8; }
};

/// Numbers of about 1: random bits below the exponent, whatever the type.
std::vector<std::uint8_t> random_numbers(DLDataType type, std::int64_t count) {
  static std::mt19937 engine(1);
  const int bytes = type.bits / 8;
  const std::uint8_t top = type.bits == 32 || type.code == kDLBfloat ? 0x3f : type.bits == 16 ? 0x3b : 0x38;
  std::vector<std::uint8_t> numbers(count * bytes);
  for (std::int64_t i = 0; i < count; ++i) {
    const std::uint32_t bits = engine();
    for (int byte = 0; byte < bytes; ++byte) numbers[i * bytes + byte] = std::uint8_t(bits >> 8 * byte);
    const std::uint8_t sign = bits >> 24 & 0x80;
    numbers[i * bytes + bytes - 1] = sign | (bytes == 1 ? top | (bits & 7) : top);
  }
  return numbers;
}

Case parse(int argc, char** argv) {
  Case c;
  const auto fail = [] {
    std::fprintf(stderr,
                 "usage: cpu_calls prefill|decode [float32|bfloat16|float16|float8] "
                 "[repeats [heads_q heads_k keys head_dim page_size]]\n");
    std::exit(2);
  };
  if (argc < 2) fail();
  const std::string kind = argv[1];
  if (kind != "prefill" && kind != "decode") fail();
  c.prefill = kind == "prefill";
  if (!c.prefill) c = {false, mate::float32, 1, 32, 8, 1024, 128, 16};
  if (argc > 2) {
    const std::string type = argv[2];
    if (type == "bfloat16") {
      c.type = mate::bfloat16;
    } else if (type == "float16") {
      c.type = mate::float16;
    } else if (type == "float8") {
      c.type = mate::float8_e4m3fn;
    } else if (type != "float32") {
      fail();
    }
  }
  int* const numbers[] = {&c.repeats, &c.heads_q, &c.heads_k, &c.keys, &c.head_dim, &c.page_size};
  for (int i = 3; i < argc; ++i) {
    if (i - 3 >= int(std::size(numbers))) fail();
    *numbers[i - 3] = std::atoi(argv[i]);
  }
  if (c.prefill) c.page_size = 0;
  return c;
}

}  // namespace

int main(int argc, char** argv) {
  const Case c = parse(argc, argv);
  const DLDataType q_type = c.type.bits == 8 ? mate::bfloat16 : c.type;
  const int page_size = c.page_size > 0 ? c.page_size : c.keys;
  const int pages = (c.keys + page_size - 1) / page_size;
  const std::int64_t cached = std::int64_t{pages} * page_size * c.heads_k * c.head_dim;
  const std::int64_t asked = std::int64_t{c.queries()} * c.heads_q * c.head_dim;
  auto q = random_numbers(q_type, asked);
  auto k = random_numbers(c.type, cached);
  auto v = random_numbers(c.type, cached);
  std::vector<std::uint8_t> out(asked * q_type.bits / 8);
  std::vector<int> page_table(pages);
  std::iota(page_table.begin(), page_table.end(), 0);
  std::shuffle(page_table.begin(), page_table.end(), std::mt19937(2));

  mate::AttentionArguments call{
      .q = {q.data(), q_type, {1, c.queries(), c.heads_q, c.head_dim}},
      .k = {k.data(), c.type, {pages, page_size, c.heads_k, c.head_dim}},
      .v = {v.data(), c.type, {pages, page_size, c.heads_k, c.head_dim}},
      .out = {out.data(), q_type, {1, c.queries(), c.heads_q, c.head_dim}},
      .causal = true,
  };
  if (!c.prefill) {
    call.seqused_k = {&c.keys, mate::int32, {1}};
    if (c.page_size > 0) call.page_table = {page_table.data(), mate::int32, {1, pages}};
  }
  double best = 1e9;
  for (int i = 0; i < c.repeats; ++i) {
    const auto start = std::chrono::steady_clock::now();
    mate::attention(call);
    best = std::min(best, std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count());
  }
  const double flops = 2.0 * c.heads_q * c.head_dim * c.keys * (c.prefill ? c.keys + 1 : 2);
  const double bytes = 2.0 * c.heads_k * c.head_dim * c.keys * c.bytes_of_number();
  std::printf("%s; best of %d: %.1f us, %.1f GFLOP/s, %.1f GB/s of keys and values\n",
              mate::describe_backends().c_str(), c.repeats, best * 1e6, flops / best / 1e9, bytes / best / 1e9);
}
