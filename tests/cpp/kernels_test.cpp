// The kernels of the CPU backend, in every table that this processor runs, against double precision.
#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <memory>
#include <ostream>
#include <string>
#include <vector>

#include "cpu/kernels/table.h"
#include "random.h"

namespace mate::cpu {
namespace {

using testing::Random;

constexpr float infinity = std::numeric_limits<float>::infinity();
constexpr float nan = std::numeric_limits<float>::quiet_NaN();

std::uint32_t bits(float value) { return std::bit_cast<std::uint32_t>(value); }

std::vector<const Kernels*> tables_of_this_processor() {
  std::vector<const Kernels*> tables = {&portable_kernels};
#ifdef __x86_64__
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (avx2) tables.push_back(&avx2_kernels);
  if (avx512) tables.push_back(&avx512_kernels);
  if (avx512 && __builtin_cpu_supports("avx512bf16")) tables.push_back(&avx512_bf16_kernels);
#endif
  return tables;
}

/// A set of products, and the table that it is in.
struct Products {
  std::string name;
  const Kernels* table;
  const PackedKernels* packed;
  ElementType type;  ///< of what is packed

  int lanes(int numbers) const { return (numbers + packed->numbers_per_lane - 1) / packed->numbers_per_lane; }
};

void PrintTo(const Products& products, std::ostream* stream) { *stream << products.name; }

std::vector<Products> products_of_this_processor() {
  std::vector<Products> all;
  for (const Kernels* table : tables_of_this_processor()) {
    const std::string name = table->name;
    all.push_back({name + "_float32_products", table, &table->float32, ElementType::float32});
    if (table->bfloat16.numbers_per_lane != 0) {
      all.push_back({name + "_bfloat16_products", table, &table->bfloat16, ElementType::bfloat16});
    }
  }
  return all;
}

class KernelsTest : public ::testing::TestWithParam<const Kernels*> {};
class ProductsTest : public ::testing::TestWithParam<Products> {};

INSTANTIATE_TEST_SUITE_P(Cpu, KernelsTest, ::testing::ValuesIn(tables_of_this_processor()),
                         [](const auto& test) { return std::string(test.param->name); });
INSTANTIATE_TEST_SUITE_P(Cpu, ProductsTest, ::testing::ValuesIn(products_of_this_processor()),
                         [](const auto& test) { return test.param.name; });

// Number formats, spelled out from their definitions.

struct Format {
  ElementType type;
  int exponent_bits;
  int mantissa_bits;
  bool infinities;

  int codes() const { return 2 << (exponent_bits + mantissa_bits); }
  int sign() const { return codes() / 2; }

  double value(int code) const {
    const int magnitude = code % sign();
    const int exponent = magnitude >> mantissa_bits;
    const int mantissa = magnitude & ((1 << mantissa_bits) - 1);
    const int bias = (1 << (exponent_bits - 1)) - 1;
    const bool last = exponent == (1 << exponent_bits) - 1;
    double result = exponent == 0 ? std::ldexp(mantissa, 1 - bias - mantissa_bits)
                                  : std::ldexp(mantissa + (1 << mantissa_bits), exponent - bias - mantissa_bits);
    if (last && infinities) result = mantissa == 0 ? double{infinity} : double{nan};
    if (!infinities && magnitude == sign() - 1) result = nan;
    return code < sign() ? result : -result;
  }

  /// Bytes of the numbers that have these codes.
  std::vector<char> bytes(const std::vector<int>& numbers) const {
    std::vector<char> result(numbers.size() * bytes_of(type));
    for (std::size_t i = 0; i < numbers.size(); ++i) {
      const auto code = static_cast<std::uint16_t>(numbers[i]);
      std::memcpy(result.data() + i * bytes_of(type), &code, bytes_of(type));  // the low byte is the first
    }
    return result;
  }

  int code(const char* bytes) const {
    std::uint16_t code = 0;
    std::memcpy(&code, bytes, bytes_of(type));
    return code;
  }
};

static_assert(std::endian::native == std::endian::little);

const std::vector<Format> narrow_formats = {
    {ElementType::float16, 5, 10, true},
    {ElementType::bfloat16, 8, 7, true},
    {ElementType::float8_e4m3, 4, 3, false},
};

const std::vector<ElementType> element_types = {ElementType::float32, ElementType::float16, ElementType::bfloat16,
                                                ElementType::float8_e4m3};

/// The same number, NaN included; the sign of zero does not matter.
bool same_number(float got, double want) { return std::isnan(want) ? std::isnan(got) : got == want; }

/// The number in `type` that the portable conversions, which tests of their own check, make of `value`.
float rounded(ElementType type, float value) {
  char number[4];
  portable_kernels.narrow(&value, type, number, 1);
  float result;
  portable_kernels.widen(type, number, 1, &result, 1);
  return result;
}

/// Rows of numbers of some type, each in memory of its own, so that sanitizers see whoever reads past the end of one.
class Placed {
 public:
  Placed(ElementType type, int rows, int width) : type_(type), width_(width), numbers_(rows), pointers_(rows) {
    for (int row = 0; row < rows; ++row) {
      numbers_[row] = std::make_unique<char[]>(std::size_t(width) * bytes_of(type));
      pointers_[row] = numbers_[row].get();
    }
  }

  /// Numbers of a normal distribution.
  Placed(Random& random, ElementType type, int rows, int width) : Placed(type, rows, width) {
    std::vector<float> floats(width);
    for (int row = 0; row < rows; ++row) {
      for (float& value : floats) value = static_cast<float>(random.normal());
      set(row, floats);
    }
  }

  void set(int row, const std::vector<float>& floats) {
    portable_kernels.narrow(floats.data(), type_, numbers_[row].get(), width_);
  }

  void set_bytes(int row, const std::vector<char>& bytes) {
    std::memcpy(numbers_[row].get(), bytes.data(), std::min(bytes.size(), std::size_t(width_) * bytes_of(type_)));
  }

  std::vector<float> get(int row) const {
    std::vector<float> floats(width_);
    portable_kernels.widen(type_, numbers_[row].get(), 1, floats.data(), width_);
    return floats;
  }

  BlockRows rows() const { return {pointers_.data(), 0}; }

 private:
  ElementType type_;
  int width_;
  std::vector<std::unique_ptr<char[]>> numbers_;
  std::vector<const char*> pointers_;
};

std::vector<float> normal_numbers(Random& random, std::size_t count) {
  std::vector<float> numbers(count);
  for (float& number : numbers) number = static_cast<float>(random.normal());
  return numbers;
}

/// What the other rows may hold.
float garbage(Random& random) {
  const std::array<float, 5> choices = {nan, infinity, -infinity, 3e38F, -0.0F};
  return choices[random.integer(0, 4)];
}

/// A sum of products against what it is in double precision, of terms whose magnitudes add up to `magnitude`.
void expect_sum(float got, double want, double magnitude) {
  EXPECT_LE(std::abs(got - want), 16 * 0x1p-24 * magnitude) << got << " instead of " << want;
}

/// weights (block_keys, strip_rows) as a left operand of accumulate.
std::vector<float> left_operand(const Products& products, const std::vector<float>& weights) {
  if (products.packed->numbers_per_lane == 1) return weights;
  std::vector<float> operand(weights.size(), nan);
  for (int key = 0; key < block_keys; key += 2) {
    for (int row = 0; row < strip_rows; ++row) {
      const float pair[2] = {weights[key * strip_rows + row], weights[(key + 1) * strip_rows + row]};
      portable_kernels.narrow(pair, products.type, &operand[key / 2 * strip_rows + row], 2);
    }
  }
  return operand;
}

/// The inverse, for the keys of `columns`; others are NaN.
std::vector<float> weights_of(const Products& products, const std::vector<float>& operand, KeyRange columns) {
  const int step = products.packed->numbers_per_lane;
  std::vector<float> weights(block_keys * strip_rows, nan);
  for (int key = columns.begin; key < columns.end; key += step) {
    for (int row = 0; row < strip_rows; ++row) {
      float lane[2];
      portable_kernels.widen(products.type, &operand[key / step * strip_rows + row], 1, lane, step);
      for (int i = 0; i < step; ++i) weights[(key + i) * strip_rows + row] = lane[i];
    }
  }
  return weights;
}

// Conversions.

TEST_P(KernelsTest, WidensEveryNumberExactly) {
  for (const Format& format : narrow_formats) {
    std::vector<int> codes(format.codes());
    for (int code = 0; code < format.codes(); ++code) codes[code] = code;
    const std::vector<char> numbers = format.bytes(codes);
    std::vector<float> floats(codes.size());
    for (const float factor : {1.0F, -0.5F}) {
      GetParam()->widen(format.type, numbers.data(), factor, floats.data(), format.codes());
      for (const int code : codes) {
        const double want = factor * format.value(code);
        EXPECT_TRUE(same_number(floats[code], want)) << "code " << code << ": " << floats[code] << ", not " << want;
        EXPECT_TRUE(std::isnan(want) || std::signbit(floats[code]) == std::signbit(want)) << "code " << code;
      }
    }
  }
}

TEST_P(KernelsTest, ConvertsAnyCountAndWritesNoMore) {
  Random random(1);
  for (const ElementType type : element_types) {
    const std::vector<float> values = normal_numbers(random, 40);
    for (int count = 0; count <= 40; ++count) {
      const std::vector<float> source(values.begin(), values.begin() + count);
      std::vector<char> narrowed(40 * 4 + 1, 'x');
      GetParam()->narrow(source.data(), type, narrowed.data(), count);
      EXPECT_EQ(narrowed[count * bytes_of(type)], 'x');
      // Memory of exactly that size.
      const std::vector<char> numbers(narrowed.begin(), narrowed.begin() + count * bytes_of(type));
      std::vector<float> widened(41, 77);
      GetParam()->widen(type, numbers.data(), 2, widened.data(), count);
      for (int i = 0; i < count; ++i) EXPECT_EQ(widened[i], 2 * rounded(type, source[i]));
      EXPECT_EQ(widened[count], 77);
    }
  }
}

TEST_P(KernelsTest, RoundsToTheNearestNumberAndTiesToEven) {
  for (const Format& format : narrow_formats) {
    std::vector<float> source;
    std::vector<int> want;
    const auto add = [&](double value, int code) {
      source.insert(source.end(), {static_cast<float>(value), static_cast<float>(-value)});
      want.insert(want.end(), {code, code + format.sign()});
    };
    int largest = format.sign() - 1;
    while (!std::isfinite(format.value(largest))) --largest;
    for (int code = 0; code <= largest; ++code) {
      const double value = format.value(code);
      // Beyond the largest number a format goes on as if it did not end: from half a step on, that is infinity.
      const double next = code < largest ? format.value(code + 1) : 2 * value - format.value(code - 1);
      const int next_code = code < largest || format.infinities ? code + 1 : code;
      const auto middle = static_cast<float>((value + next) / 2);
      add(value, code);
      add(std::nextafter(middle, 0.0F), code);
      add(middle, code % 2 == 0 ? code : next_code);
      add(std::nextafter(middle, infinity), next_code);
    }
    add(std::numeric_limits<float>::max(), format.infinities ? largest + 1 : largest);
    add(infinity, format.infinities ? largest + 1 : largest);
    add(std::numeric_limits<float>::denorm_min(), 0);
    std::vector<char> numbers(source.size() * bytes_of(format.type));
    GetParam()->narrow(source.data(), format.type, numbers.data(), static_cast<int>(source.size()));
    for (std::size_t i = 0; i < source.size(); ++i) {
      EXPECT_EQ(format.code(numbers.data() + i * bytes_of(format.type)), want[i]) << "of " << source[i];
    }
    for (const std::uint32_t pattern : {0x7fc00000U, 0xffc00000U, 0x7f800001U, 0xff800001U, 0x7fffffffU}) {
      const auto value = std::bit_cast<float>(pattern);
      char number[2];
      GetParam()->narrow(&value, format.type, number, 1);
      EXPECT_TRUE(std::isnan(format.value(format.code(number)))) << "of NaN " << pattern;
    }
  }
}

// Kernels that read rows where they lie widen numbers in registers: whole vectors, and the rest of a row.

TEST_P(KernelsTest, DotScoresWidensEveryNumberExactly) {
  constexpr int rows = 5;
  for (const Format& format : narrow_formats) {
    for (const int depth : {width_multiple, width_multiple - 1, 1}) {
      // Queries are rounded up to whole vectors, with zeros.
      std::vector<float> queries(rows * width_multiple);
      for (int row = 0; row < rows; ++row) std::fill_n(queries.begin() + row * width_multiple, depth, 1.0F);
      Placed keys(format.type, key_step, depth);
      std::vector<float> scores(key_step * strip_rows);
      for (int first = 0; first < format.codes(); first += key_step) {
        for (int key = 0; key < key_step; ++key) {
          // Among zeros each number is a product of its own.
          std::vector<int> codes(depth);
          codes[(first / key_step + key) % depth] = first + key;
          keys.set_bytes(key, format.bytes(codes));
        }
        GetParam()->dot_scores(format.type, keys.rows(), queries.data(), width_multiple, {0, key_step}, rows, depth,
                               false, scores.data());
        for (int key = 0; key < key_step; ++key) {
          for (int row = 0; row < rows; ++row) {
            const float got = scores[key * strip_rows + row];
            ASSERT_TRUE(same_number(got, format.value(first + key))) << "code " << first + key << ": " << got;
          }
        }
      }
    }
  }
}

TEST_P(KernelsTest, SumValuesWidensEveryNumberExactly) {
  constexpr int width = 61;
  constexpr int stride = 64;
  for (const Format& format : narrow_formats) {
    Placed values(format.type, block_keys, width);
    std::vector<float> weights(block_keys * strip_rows);
    std::fill_n(weights.begin() + 3 * strip_rows, 2, 1.0F);
    // The numbers move on by one, so that each comes to lie in several places.
    for (int first = 0; first < format.codes(); first += width - 1) {
      std::vector<int> codes(width);
      for (int i = 0; i < width; ++i) codes[i] = (first + i) % format.codes();
      values.set_bytes(3, format.bytes(codes));
      std::vector<float> sums(2 * stride, nan);
      GetParam()->sum_values(format.type, weights.data(), values.rows(), {0, key_step}, false, sums.data(), stride, 2,
                             width);
      for (int row = 0; row < 2; ++row) {
        for (int i = 0; i < width; ++i) {
          ASSERT_TRUE(same_number(sums[row * stride + i], format.value(codes[i]))) << "code " << codes[i];
        }
      }
    }
  }
}

// Softcap.

TEST_P(KernelsTest, CapsScores) {
  std::vector<float> arguments = {0.0F, -0.0F, infinity, -infinity, nan, 1e-38F, 1e-44F, 1e-20F, 0.625F, 3e38F};
  for (int i = -200; i <= 200; ++i) arguments.push_back(static_cast<float>(std::exp2(i / 8.0)));
  for (int i = -12000; i <= 12000; ++i) arguments.push_back(static_cast<float>(i) / 1000);
  arguments.resize((arguments.size() + strip_rows - 1) / strip_rows * strip_rows);
  const int keys = static_cast<int>(arguments.size()) / strip_rows;
  for (const auto& [scale, softcap] : std::vector<std::array<float, 2>>{{1, 1}, {0.125F, 50}, {3, 0.1F}}) {
    std::vector<float> scores = arguments;
    GetParam()->cap_scores(scores.data(), {0, keys}, scale, softcap, strip_rows);
    for (std::size_t i = 0; i < arguments.size(); ++i) {
      const double want = softcap * std::tanh(double{scale} * arguments[i] / softcap);
      if (std::isnan(want)) {
        EXPECT_TRUE(std::isnan(scores[i]));
        continue;
      }
      // The argument, which the product and the quotient round, moves the result by no more than its own error.
      EXPECT_LE(std::abs(scores[i] - want), 8 * 0x1p-24 * std::abs(want) + std::max(softcap, 1.0F) * 0x1p-148)
          << "tanh of " << arguments[i];
      EXPECT_EQ(std::signbit(scores[i]), std::signbit(want)) << "tanh of " << arguments[i];
    }
  }
}

// The softmax.

/// Scores of a strip and its softmax so far.
struct Strip {
  std::vector<float> scores = std::vector<float>(block_keys * strip_rows);
  std::vector<float> max = std::vector<float>(strip_rows, -infinity);
  std::vector<float> sum = std::vector<float>(strip_rows);
  std::vector<float> rescale = std::vector<float>(strip_rows, nan);
  std::vector<int> begin = std::vector<int>(strip_rows);
  std::vector<int> count = std::vector<int>(strip_rows);

  float& score(int key, int row) { return scores[key * strip_rows + row]; }

  /// Replaces the scores by the weights, as floats.
  void update(const Products& products, KeyRange columns, bool masked, float scale = 1, int rows = strip_rows,
              int first_key = 0) {
    const VisibleKeys visible =
        masked ? VisibleKeys{begin.data(), count.data(), first_key} : VisibleKeys{nullptr, nullptr, first_key};
    products.packed->update_softmax(scores.data(), columns, visible, scale, rows, {max.data(), sum.data()},
                                    rescale.data());
    scores = weights_of(products, scores, columns);
  }
};

/// A unit in the last place of float32 at `value`.
double unit(double value) { return std::max(std::ldexp(1.0, std::ilogb(value) - 23), 0x1p-149); }

TEST_P(ProductsTest, WeightsArePowersOfTwo) {
  const bool half = GetParam().type == ElementType::bfloat16;
  constexpr int sheets = 64;
  constexpr int samples = sheets * (block_keys - 1) * strip_rows;
  double largest = 0;
  for (int sheet = 0; sheet < sheets; ++sheet) {
    Strip strip;
    int sample = sheet * (block_keys - 1) * strip_rows;
    for (int row = 0; row < strip_rows; ++row) {
      strip.score(sheet, row) = 0;  // the largest of its row
      for (int key = 0; key < block_keys; ++key) {
        if (key != sheet) strip.score(key, row) = static_cast<float>(-126.5 * sample++ / (samples - 1));
      }
    }
    Strip before = strip;
    strip.update(GetParam(), {0, block_keys}, false);
    for (int row = 0; row < strip_rows; ++row) {
      EXPECT_EQ(strip.max[row], 0);
      EXPECT_EQ(strip.rescale[row], 0) << "of the sums of no keys";
      EXPECT_EQ(strip.score(sheet, row), 1);
      double sum = 0;
      for (int key = 0; key < block_keys; ++key) {
        const double want = std::exp2(double{before.score(key, row)});
        const double error = std::abs(strip.score(key, row) - want);
        sum += want;
        if (half) {
          // The processor's products take subnormal numbers for 0.
          const double allowed = want < 0x1p-126 ? want : want * 0x1p-8 + 2 * unit(want);
          EXPECT_LE(error, allowed) << "2**" << before.score(key, row);
        } else {
          largest = std::max(largest, error / unit(want));
          EXPECT_LE(error, 2 * unit(want)) << "2**" << before.score(key, row);
        }
      }
      EXPECT_NEAR(strip.sum[row], sum, (block_keys / 2 + 4) * 0x1p-24 * sum);  // in two chains of additions
    }
  }
  RecordProperty("units_in_the_last_place", std::to_string(largest));
}

TEST_P(ProductsTest, WeightsOfSpecialScores) {
  Strip strip;
  for (int row = 0; row < strip_rows; ++row) {
    for (int key = 0; key < block_keys; ++key) strip.score(key, row) = -1;
    strip.score(0, row) = 0;
    strip.score(1, row) = -infinity;
    strip.score(2, row) = -127;
    strip.score(3, row) = -150;
    strip.score(4, row) = -1e30F;
    strip.score(5, row) = -std::numeric_limits<float>::max();
    if (row % 2 == 1) strip.score(6, row) = nan;
  }
  strip.update(GetParam(), {0, block_keys}, false);
  for (int row = 0; row < strip_rows; ++row) {
    EXPECT_EQ(strip.max[row], 0) << "NaN is no maximum";
    EXPECT_EQ(strip.score(0, row), 1);
    for (int key = 1; key <= 5; ++key) EXPECT_EQ(bits(strip.score(key, row)), 0U) << "key " << key;
    EXPECT_EQ(std::isnan(strip.score(6, row)), row % 2 == 1);
    EXPECT_EQ(std::isnan(strip.sum[row]), row % 2 == 1);
    EXPECT_EQ(strip.score(7, row), 0.5F);
  }
}

TEST_P(ProductsTest, WeightsOfRowsWithoutAFiniteScore) {
  Strip strip;
  for (int row = 0; row < strip_rows; ++row) {
    for (int key = 0; key < block_keys; ++key) strip.score(key, row) = -infinity;
    if (row % 3 == 1) strip.score(5, row) = nan;
    if (row % 3 == 2) strip.score(5, row) = infinity;
  }
  strip.update(GetParam(), {0, block_keys}, false);
  for (int row = 0; row < strip_rows; ++row) {
    EXPECT_EQ(strip.max[row], row % 3 == 2 ? infinity : -infinity);
    EXPECT_EQ(strip.score(4, row), 0);
    if (row % 3 == 0) {
      EXPECT_EQ(bits(strip.sum[row]), 0U);
      EXPECT_EQ(strip.score(5, row), 0);
    } else {
      EXPECT_TRUE(std::isnan(strip.sum[row]));
      EXPECT_TRUE(std::isnan(strip.score(5, row)));
    }
  }
}

TEST_P(ProductsTest, SoftmaxGoesOnOverBlocks) {
  Random random(2);
  const float scale = 0.37F;
  Strip strip;
  std::vector<std::vector<double>> seen(strip_rows);
  double largest_max = 0;
  for (const KeyRange columns : {KeyRange{0, block_keys}, KeyRange{8, 24}, KeyRange{56, 64}, KeyRange{0, 40}}) {
    for (int key = 0; key < block_keys; ++key) {
      for (int row = 0; row < strip_rows; ++row) {
        const bool outside = key < columns.begin || key >= columns.end;
        strip.score(key, row) = outside ? garbage(random) : static_cast<float>(random.uniform(-60, 60));
        if (!outside) seen[row].push_back(double{scale} * strip.score(key, row));
      }
    }
    const std::vector<float> old_max = strip.max;
    strip.update(GetParam(), columns, false, scale);
    for (int row = 0; row < strip_rows; ++row) {
      const double max = *std::max_element(seen[row].begin(), seen[row].end());
      EXPECT_NEAR(strip.max[row], max, 0x1p-24 * std::abs(max));
      largest_max = std::max(largest_max, std::abs(max));
      const double factor = std::exp2(double{old_max[row]} - strip.max[row]);
      EXPECT_NEAR(strip.rescale[row], factor, 0x1p-18 * factor);
      double sum = 0;
      for (const double score : seen[row]) sum += std::exp2(score - max);
      EXPECT_NEAR(strip.sum[row], sum, 0x1p-17 * sum);  // scores of 20 are rounded by 2**-20
    }
  }
  EXPECT_GT(largest_max, 0);
}

TEST_P(ProductsTest, HiddenKeysWeighExactlyNothing) {
  Random random(3);
  for (const KeyRange columns : {KeyRange{0, block_keys}, KeyRange{16, 48}}) {
    for (const int first_key : {0, 128}) {
      Strip strip;
      for (int row = 0; row < strip_rows; ++row) {
        // Ranges that begin before the block, end after it, lie outside of it, or hold nothing.
        const int begin = static_cast<int>(random.integer(-40, 70));
        const int count = row % 7 == 0 ? 0 : static_cast<int>(random.integer(0, 90));
        strip.begin[row] = begin + first_key;
        strip.count[row] = count;
        for (int key = 0; key < block_keys; ++key) {
          const bool sees = begin <= key && key < begin + count;
          strip.score(key, row) = sees ? static_cast<float>(random.uniform(-20, 20)) : garbage(random);
        }
      }
      const Strip before = strip;
      strip.update(GetParam(), columns, true, 1, strip_rows, first_key);
      for (int row = 0; row < strip_rows; ++row) {
        const int begin = std::max(before.begin[row] - first_key, columns.begin);
        const int end = std::min(before.begin[row] - first_key + before.count[row], columns.end);
        float max = -infinity;
        for (int key = begin; key < end; ++key) max = std::max(max, before.scores[key * strip_rows + row]);
        EXPECT_EQ(strip.max[row], max);
        double sum = 0;
        for (int key = columns.begin; key < columns.end; ++key) {
          const float weight = strip.score(key, row);
          if (key < begin || key >= end) {
            EXPECT_EQ(bits(weight), 0U) << "key " << key << " of row " << row;
          } else {
            const double want = std::exp2(double{before.scores[key * strip_rows + row]} - max);
            sum += want;
            EXPECT_NEAR(weight, want, (GetParam().type == ElementType::bfloat16 ? 0x1p-8 : 0x1p-18) * want);
          }
        }
        EXPECT_NEAR(strip.sum[row], sum, 0x1p-18 * sum);
      }
    }
  }
}

TEST_P(ProductsTest, SoftmaxOfARowDependsOnNoOther) {
  Random random(4);
  Strip whole;
  for (float& score : whole.scores) score = static_cast<float>(random.uniform(-30, 30));
  for (int row = 0; row < strip_rows; ++row) {
    whole.max[row] = static_cast<float>(random.uniform(-20, 20));
    whole.sum[row] = static_cast<float>(random.uniform(0, 100));
    whole.begin[row] = static_cast<int>(random.integer(-40, 70));
    whole.count[row] = static_cast<int>(random.integer(0, 90));
  }
  const Strip before = whole;
  const KeyRange columns{8, 56};
  for (const bool masked : {false, true}) {
    whole = before;
    whole.update(GetParam(), columns, masked, 0.7F);
    for (int rows = 1; rows <= strip_rows; ++rows) {
      Strip part = before;
      for (int row = rows; row < strip_rows; ++row) {
        for (int key = 0; key < block_keys; ++key) part.score(key, row) = garbage(random);
        part.max[row] = garbage(random);
        part.sum[row] = garbage(random);
        part.begin[row] = part.count[row] = static_cast<int>(random.integer(-1000, 1000));
      }
      part.update(GetParam(), columns, masked, 0.7F, rows);
      for (int row = 0; row < rows; ++row) {
        EXPECT_EQ(bits(part.max[row]), bits(whole.max[row])) << rows << " rows";
        EXPECT_EQ(bits(part.sum[row]), bits(whole.sum[row])) << rows << " rows";
        EXPECT_EQ(bits(part.rescale[row]), bits(whole.rescale[row])) << rows << " rows";
        for (int key = columns.begin; key < columns.end; ++key) {
          ASSERT_EQ(bits(part.score(key, row)), bits(whole.score(key, row))) << rows << " rows, key " << key;
        }
      }
    }
  }
}

// Products of packed operands.

/// Operands of multiply_scores: as numbers, and packed.
struct ScoreOperands {
  const Products& products;
  int depth;
  Placed keys;
  std::vector<float> queries;  ///< (strip_rows, stride)
  int stride;

  ScoreOperands(Random& random, const Products& products, ElementType type, int depth)
      : products(products),
        depth(depth),
        keys(random, type, block_keys, depth),
        queries(normal_numbers(random, strip_rows * (depth + 3))),
        stride(depth + 3) {}

  /// The products with the first `rows` queries. Nothing is known of what else the memory holds.
  std::vector<float> scores(KeyRange columns, int rows, ElementType type) const {
    const int lanes = products.lanes(depth);
    std::vector<float> packed_keys(block_keys * lanes, nan);
    std::vector<float> packed_queries(lanes * strip_rows, nan);
    products.packed->pack_keys(type, keys.rows(), columns, depth, packed_keys.data(), lanes);
    products.packed->pack_queries(queries.data(), stride, rows, depth, packed_queries.data());
    const int padded = (rows + width_multiple - 1) / width_multiple * width_multiple;
    for (int i = 0; i < lanes; ++i) {
      for (int row = rows; row < padded; ++row) EXPECT_EQ(bits(packed_queries[i * strip_rows + row]), 0U);
    }
    std::vector<float> scores(block_keys * strip_rows, nan);
    products.packed->multiply_scores(packed_keys.data(), packed_queries.data(), columns, rows, lanes, scores.data());
    return scores;
  }
};

/// The types of keys and values that a set of products takes.
std::vector<ElementType> types_of(const Products& products) {
  return products.type == ElementType::bfloat16 ? std::vector{ElementType::bfloat16} : element_types;
}

TEST_P(ProductsTest, MultipliesScores) {
  Random random(5);
  for (const ElementType type : types_of(GetParam())) {
    for (const int depth : {1, 2, 3, 17, 63, 64, 129, 255, 300, max_head_dim}) {
      const ScoreOperands operands(random, GetParam(), type, depth);
      const KeyRange columns = depth % 2 == 0 ? KeyRange{0, block_keys} : KeyRange{8, 32};
      const int rows = static_cast<int>(random.integer(1, strip_rows));
      const std::vector<float> scores = operands.scores(columns, rows, type);
      for (int key = columns.begin; key < columns.end; ++key) {
        const std::vector<float> numbers = operands.keys.get(key);
        for (int row = 0; row < rows; ++row) {
          double want = 0;
          double magnitude = 0;
          for (int i = 0; i < depth; ++i) {
            const float query = operands.queries[row * operands.stride + i];
            const double term = double{numbers[i]} * rounded(GetParam().type, query);
            want += term;
            magnitude += std::abs(term);
          }
          expect_sum(scores[key * strip_rows + row], want, magnitude);
        }
      }
    }
  }
}

TEST_P(ProductsTest, ScoresOfARowDependOnNoOther) {
  Random random(6);
  for (const int depth : {37, 128, 192}) {
    const int lanes = GetParam().lanes(depth);
    const ScoreOperands operands(random, GetParam(), GetParam().type, depth);
    const std::vector<float> whole = operands.scores({0, block_keys}, strip_rows, GetParam().type);
    std::vector<float> keys(block_keys * lanes);
    std::vector<float> queries(lanes * strip_rows);
    GetParam().packed->pack_keys(GetParam().type, operands.keys.rows(), {0, block_keys}, depth, keys.data(), lanes);
    GetParam().packed->pack_queries(operands.queries.data(), operands.stride, strip_rows, depth, queries.data());
    for (int rows = strip_rows; rows >= 1; --rows) {
      if (rows < strip_rows) {
        for (int i = 0; i < lanes; ++i) queries[i * strip_rows + rows] = garbage(random);
      }
      const KeyRange columns = rows % 2 == 0 ? KeyRange{0, block_keys} : KeyRange{16, 40};
      std::vector<float> scores(block_keys * strip_rows, nan);
      GetParam().packed->multiply_scores(keys.data(), queries.data(), columns, rows, lanes, scores.data());
      for (int key = columns.begin; key < columns.end; ++key) {
        for (int row = 0; row < rows; ++row) {
          const int i = key * strip_rows + row;
          ASSERT_EQ(bits(scores[i]), bits(whole[i])) << rows << " rows, key " << key;
        }
      }
    }
  }
}

/// Operands of PackedKernels::accumulate.
struct SumOperands {
  Placed values;
  std::vector<float> weights;  ///< (block_keys, strip_rows)
  std::vector<float> rescale;
  std::vector<float> sums;  ///< (strip_rows, stride)
  int stride;

  SumOperands(Random& random, ElementType type, int width, int stride)
      : values(random, type, block_keys, width),
        weights(block_keys * strip_rows),
        rescale(strip_rows),
        sums(normal_numbers(random, strip_rows * stride)),
        stride(stride) {
    for (float& weight : weights) weight = static_cast<float>(random.uniform());
    for (float& factor : rescale) factor = static_cast<float>(random.uniform());
  }

  /// Checks new sums, but for those beyond `width`. `factors` are what the sums so far were multiplied by.
  void check(const std::vector<float>& got, KeyRange columns, int rows, int width, const std::vector<float>& factors,
             ElementType weight_type) const {
    std::vector<std::vector<float>> numbers;
    for (int key = 0; key < block_keys; ++key) numbers.push_back(values.get(key));
    for (int row = 0; row < rows; ++row) {
      for (int i = 0; i < width; ++i) {
        double want = double{factors[row]} * sums[row * stride + i];
        double magnitude = std::abs(want);
        for (int key = columns.begin; key < columns.end; ++key) {
          const double term = double{rounded(weight_type, weights[key * strip_rows + row])} * numbers[key][i];
          want += term;
          magnitude += std::abs(term);
        }
        expect_sum(got[row * stride + i], want, magnitude);
      }
    }
  }

  /// Nothing but `rows` rows of sums was written.
  void check_beyond(const std::vector<float>& got, int rows) const {
    for (std::size_t i = std::size_t(rows) * stride; i < sums.size(); ++i) {
      EXPECT_EQ(bits(got[i]), bits(sums[i])) << "of a row beyond the last";
    }
  }
};

TEST_P(ProductsTest, Accumulates) {
  Random random(7);
  const PackedKernels& packed = *GetParam().packed;
  for (const ElementType type : types_of(GetParam())) {
    for (const int width : {1, 15, 16, 33, 64, 80, 129, 200}) {
      const int stride = (width + width_multiple - 1) / width_multiple * width_multiple;
      SumOperands operands(random, type, width, stride);
      const KeyRange columns = width % 2 == 0 ? KeyRange{0, block_keys} : KeyRange{24, 40};
      const int rows = static_cast<int>(random.integer(1, strip_rows));
      std::vector<float> values(block_keys / packed.numbers_per_lane * stride, nan);
      packed.pack_values(type, operands.values.rows(), columns, width, values.data(), stride);
      const std::vector<float> weights = left_operand(GetParam(), operands.weights);
      std::vector<float> sums = operands.sums;
      packed.accumulate(weights.data(), values.data(), columns, operands.rescale.data(), sums.data(), rows, stride);
      operands.check(sums, columns, rows, width, operands.rescale, GetParam().type);
      operands.check_beyond(sums, rows);
    }
  }
}

TEST_P(ProductsTest, SumsOfARowDependOnNoOther) {
  Random random(8);
  const PackedKernels& packed = *GetParam().packed;
  for (const int width : {16, 48, 144}) {
    SumOperands operands(random, GetParam().type, width, width);
    const KeyRange columns{8, 56};
    std::vector<float> values(block_keys / packed.numbers_per_lane * width);
    packed.pack_values(GetParam().type, operands.values.rows(), columns, width, values.data(), width);
    std::vector<float> whole = operands.sums;
    packed.accumulate(left_operand(GetParam(), operands.weights).data(), values.data(), columns,
                      operands.rescale.data(), whole.data(), strip_rows, width);
    for (int rows = strip_rows; rows >= 1; --rows) {
      if (rows < strip_rows) {
        for (int key = 0; key < block_keys; ++key) operands.weights[key * strip_rows + rows] = garbage(random);
        operands.rescale[rows] = garbage(random);
      }
      std::vector<float> sums = operands.sums;
      packed.accumulate(left_operand(GetParam(), operands.weights).data(), values.data(), columns,
                        operands.rescale.data(), sums.data(), rows, width);
      for (int i = 0; i < rows * width; ++i) ASSERT_EQ(bits(sums[i]), bits(whole[i])) << rows << " rows";
    }
  }
}

// Products with rows that lie where they lie.

TEST_P(KernelsTest, DotsScores) {
  Random random(9);
  for (const ElementType type : element_types) {
    for (const int depth : {1, 3, 4, 7, 16, 31, 64, 77, 128, 255}) {
      const Placed keys(random, type, block_keys, depth);
      // The queries are rounded up to whole vectors, with zeros.
      const int stride = (depth + width_multiple - 1) / width_multiple * width_multiple;
      std::vector<float> queries = normal_numbers(random, streamed_rows * stride);
      for (int row = 0; row < streamed_rows; ++row) {
        for (int i = depth; i < stride; ++i) queries[row * stride + i] = 0;
      }
      const int rows = static_cast<int>(random.integer(1, streamed_rows));
      const KeyRange columns = depth % 2 == 0 ? KeyRange{0, block_keys} : KeyRange{8, 32};
      const std::vector<float> before = normal_numbers(random, block_keys * strip_rows);
      for (const bool add : {false, true}) {
        std::vector<float> scores = before;
        GetParam()->dot_scores(type, keys.rows(), queries.data(), stride, columns, rows, depth, add, scores.data());
        for (int key = 0; key < block_keys; ++key) {
          const std::vector<float> numbers = keys.get(key);
          for (int row = 0; row < strip_rows; ++row) {
            const float old = before[key * strip_rows + row];
            if (key < columns.begin || key >= columns.end || row >= rows) {
              EXPECT_EQ(bits(scores[key * strip_rows + row]), bits(old)) << "key " << key << ", row " << row;
              continue;
            }
            double want = add ? old : 0;
            double magnitude = std::abs(want);
            for (int i = 0; i < depth; ++i) {
              const double term = double{numbers[i]} * queries[row * stride + i];
              want += term;
              magnitude += std::abs(term);
            }
            expect_sum(scores[key * strip_rows + row], want, magnitude);
          }
        }
      }
    }
  }
}

TEST_P(KernelsTest, DotScoresOfARowDependOnNoOther) {
  Random random(10);
  for (const ElementType type : element_types) {
    for (const int depth : {64, 75}) {
      const int stride = (depth + width_multiple - 1) / width_multiple * width_multiple;
      const Placed keys(random, type, block_keys, depth);
      std::vector<float> queries = normal_numbers(random, strip_rows * stride);
      for (int row = 0; row < strip_rows; ++row) {
        for (int i = depth; i < stride; ++i) queries[row * stride + i] = 0;
      }
      std::vector<float> whole(block_keys * strip_rows);
      GetParam()->dot_scores(type, keys.rows(), queries.data(), stride, {0, block_keys}, strip_rows, depth, false,
                             whole.data());
      for (int rows = strip_rows; rows >= 1; --rows) {
        if (rows < strip_rows) {
          for (int i = 0; i < stride; ++i) queries[rows * stride + i] = garbage(random);
        }
        // Where a range begins does not matter to a key either.
        const KeyRange columns = rows % 2 == 0 ? KeyRange{0, 16} : KeyRange{12, 24};
        std::vector<float> scores(block_keys * strip_rows, nan);
        GetParam()->dot_scores(type, keys.rows(), queries.data(), stride, columns, rows, depth, false, scores.data());
        for (int key = columns.begin; key < columns.end; ++key) {
          for (int row = 0; row < rows; ++row) {
            const int i = key * strip_rows + row;
            ASSERT_EQ(bits(scores[i]), bits(whole[i])) << rows << " rows, key " << key;
          }
        }
      }
    }
  }
}

TEST_P(KernelsTest, SumsValues) {
  Random random(11);
  for (const ElementType type : element_types) {
    for (const int width : {1, 5, 15, 16, 33, 64, 77, 130}) {
      const int stride = (width + width_multiple - 1) / width_multiple * width_multiple;
      const SumOperands operands(random, type, width, stride);
      const KeyRange columns = width % 2 == 0 ? KeyRange{0, block_keys} : KeyRange{24, 40};
      const int rows = static_cast<int>(random.integer(1, streamed_rows));
      for (const bool add : {false, true}) {
        // Where nothing is added, what the memory holds is not looked at.
        std::vector<float> sums = operands.sums;
        if (!add) std::fill_n(sums.begin(), rows * stride, nan);
        GetParam()->sum_values(type, operands.weights.data(), operands.values.rows(), columns, add, sums.data(), stride,
                               rows, width);
        operands.check(sums, columns, rows, width, std::vector<float>(rows, add ? 1.0F : 0.0F), ElementType::float32);
        operands.check_beyond(sums, rows);
      }
    }
  }
}

TEST_P(KernelsTest, SumsOfValuesOfARowDependOnNoOther) {
  Random random(12);
  for (const ElementType type : element_types) {
    constexpr int width = 77;
    constexpr int stride = 80;
    SumOperands operands(random, type, width, stride);
    const KeyRange columns{8, 24};
    for (const bool add : {false, true}) {
      std::vector<float> whole = operands.sums;
      std::vector<float> weights = operands.weights;
      GetParam()->sum_values(type, weights.data(), operands.values.rows(), columns, add, whole.data(), stride,
                             strip_rows, width);
      for (int rows = strip_rows; rows >= 1; --rows) {
        if (rows < strip_rows) {
          for (int key = 0; key < block_keys; ++key) weights[key * strip_rows + rows] = garbage(random);
        }
        std::vector<float> sums = operands.sums;
        GetParam()->sum_values(type, weights.data(), operands.values.rows(), columns, add, sums.data(), stride, rows,
                               width);
        for (int row = 0; row < rows; ++row) {
          for (int i = 0; i < width; ++i) {
            ASSERT_EQ(bits(sums[row * stride + i]), bits(whole[row * stride + i])) << rows << " rows";
          }
        }
      }
    }
  }
}

TEST_P(KernelsTest, AddsTheSumsOfABlock) {
  Random random(13);
  for (const int width : {16, 48, 144}) {
    const std::vector<float> block = normal_numbers(random, strip_rows * width);
    const std::vector<float> rescale = normal_numbers(random, strip_rows);
    const std::vector<float> before = normal_numbers(random, strip_rows * width);
    std::vector<float> whole = before;
    GetParam()->add_block(block.data(), rescale.data(), whole.data(), strip_rows, width);
    for (int i = 0; i < strip_rows * width; ++i) {
      const double rescaled = double{rescale[i / width]} * before[i];
      expect_sum(whole[i], rescaled + block[i], std::abs(rescaled) + std::abs(block[i]));
    }
    for (int rows = 1; rows < strip_rows; ++rows) {
      std::vector<float> sums = before;
      GetParam()->add_block(block.data(), rescale.data(), sums.data(), rows, width);
      for (int i = 0; i < strip_rows * width; ++i) {
        ASSERT_EQ(bits(sums[i]), bits(i < rows * width ? whole[i] : before[i])) << rows << " rows";
      }
    }
  }
}

}  // namespace
}  // namespace mate::cpu
