// A prompt and a decoding step: attention over a whole sequence, and the same last row from a cache that grows.

#include <mate/attention.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <random>
#include <vector>

namespace {

constexpr int length = 100;  // keys and queries of the sequence
constexpr int heads_q = 8;
constexpr int heads_k = 2;
constexpr int head_dim = 64;
constexpr int page_size = 16;
constexpr int pages = (length + page_size - 1) / page_size;

std::vector<float> random_rows(int rows, int heads) {
  static std::mt19937 engine(1);
  std::normal_distribution<float> normal;
  std::vector<float> values(std::size_t(rows) * heads * head_dim);
  for (float& value : values) value = normal(engine);
  return values;
}

}  // namespace

int main() {
  const std::vector<float> q = random_rows(length, heads_q);
  const std::vector<float> k = random_rows(length, heads_k);
  const std::vector<float> v = random_rows(length, heads_k);

  // The whole sequence at once.
  std::vector<float> out(q.size());
  mate::attention({
      .q = {q.data(), mate::float32, {1, length, heads_q, head_dim}},
      .k = {k.data(), mate::float32, {1, length, heads_k, head_dim}},
      .v = {v.data(), mate::float32, {1, length, heads_k, head_dim}},
      .out = {out.data(), mate::float32, {1, length, heads_q, head_dim}},
      .causal = true,
  });

  // All keys but the last lie in the pages of a cache; the last is appended by the call that attends to it.
  std::vector<float> k_cache(std::size_t(pages) * page_size * heads_k * head_dim);
  std::vector<float> v_cache(k_cache.size());
  const int cached = length - 1;
  const std::size_t cached_elements = std::size_t(cached) * heads_k * head_dim;
  std::copy_n(k.begin(), cached_elements, k_cache.begin());
  std::copy_n(v.begin(), cached_elements, v_cache.begin());
  std::vector<int> page_table(pages);
  for (int page = 0; page < pages; ++page) page_table[page] = page;

  std::vector<float> last(std::size_t(heads_q) * head_dim);
  mate::attention({
      .q = {&q[std::size_t(cached) * heads_q * head_dim], mate::float32, {1, 1, heads_q, head_dim}},
      .k = {k_cache.data(), mate::float32, {pages, page_size, heads_k, head_dim}},
      .v = {v_cache.data(), mate::float32, {pages, page_size, heads_k, head_dim}},
      .out = {last.data(), mate::float32, {1, 1, heads_q, head_dim}},
      .seqused_k = {&cached, mate::int32, {1}},
      .page_table = {page_table.data(), mate::int32, {1, pages}},
      .k_new = {&k[cached_elements], mate::float32, {1, 1, heads_k, head_dim}},
      .v_new = {&v[cached_elements], mate::float32, {1, 1, heads_k, head_dim}},
      .causal = true,
  });

  float difference = 0;
  for (std::size_t i = 0; i < last.size(); ++i) {
    difference = std::fmax(difference, std::fabs(last[i] - out[out.size() - last.size() + i]));
  }
  std::printf("MATE %s; %s\n", MATE_VERSION, mate::describe_backends().c_str());
  std::printf("decoding differs from prefill by at most %.1e\n", difference);

  // Errors name the argument.
  try {
    mate::attention({.q = {q.data(), mate::float32, {1, length, heads_q, head_dim}}});
  } catch (const mate::Error& error) {
    std::printf("an incomplete call: %s\n", error.what());
  }
  return difference < 1e-5F ? 0 : 1;
}
