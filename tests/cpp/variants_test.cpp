// The forward kernels that choices lead to: told apart by their numbers, and within what a multiprocessor has.
#include "cuda/variants.h"

#include <gtest/gtest.h>

#include <cstdint>
#include <map>
#include <string>

#include "random.h"

namespace mate::cuda {
namespace {

VariantChoice draw(testing::Random& random) {
  constexpr ElementType bf16 = ElementType::bfloat16;
  constexpr ElementType f16 = ElementType::float16;
  constexpr ElementType e4m3 = ElementType::float8_e4m3;
  VariantChoice choice;
  choice.head_dim = static_cast<int>(random.integer(1, 512));
  choice.head_dim_v = random.chance(0.5) ? choice.head_dim : static_cast<int>(random.integer(1, 512));
  choice.types = random.one_of<TensorTypes>(
      {{bf16, bf16, bf16}, {f16, f16, f16}, {e4m3, e4m3, bf16}, {e4m3, e4m3, f16}, {bf16, e4m3, bf16}});
  choice.scores = random.one_of<Scores>({Scores::products, Scores::scaled, Scores::capped});
  for (bool* flag : {&choice.gather, &choice.splits, &choice.few_rows, &choice.narrow, &choice.low_tiles, &choice.alike,
                     &choice.qv, &choice.plain, &choice.clusters, &choice.merges_in_cluster}) {
    *flag = random.chance(0.5);
  }
  const std::int64_t rows = choice.few_rows ? random.integer(1, 64) : 64;
  choice.transposed_rows = transposed_rows_for(rows);
  if (choice.few_rows && choice.splits && !choice.qv) {
    choice.stream_rows = stream_rows_for(choice.types, choice.head_dim, choice.head_dim_v, rows);
  }
  return choice;
}

TEST(Variants, AreToldApart) {
  testing::Random random(0);
  std::map<std::uint64_t, std::string> texts;
  std::map<std::string, std::uint64_t> keys;
  for (int n = 0; n < 20'000; ++n) {
    const ForwardVariant variant = choose_variant(draw(random));
    const KernelSource source = source_of(variant);
    EXPECT_EQ(texts.try_emplace(key_of(variant), source.text).first->second, source.text);
    EXPECT_EQ(keys.try_emplace(source.name, key_of(variant)).first->second, key_of(variant)) << source.name;
  }
  EXPECT_GT(texts.size(), 1'000);
}

TEST(Variants, FitAMultiprocessor) {
  testing::Random random(1);
  for (int n = 0; n < 20'000; ++n) {
    const ForwardVariant variant = choose_variant(draw(random));
    const std::string name = source_of(variant).name;
    EXPECT_LE(variant.shared_bytes(), most_shared_bytes) << name;
    EXPECT_GE(variant.stages, 1) << name;
    EXPECT_LE(variant.threads(), 1024) << name;
    EXPECT_LE(variant.registers_at_start() * variant.threads(), 64 * 1024) << name;
  }
}

}  // namespace
}  // namespace mate::cuda
