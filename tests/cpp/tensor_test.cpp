// Tensor views, and the number formats with which the other tests read and write them.
#include <gtest/gtest.h>
#include <mate/error.h>
#include <mate/tensor.h>

#include <cmath>
#include <cstdint>
#include <limits>
#include <string>

#include "memory.h"

namespace mate {
namespace {

static_assert(!Tensor().given());
static_assert(float32 == DLDataType{kDLFloat, 32, 1} && !(float32 == float16) && !(float16 == bfloat16));
static_assert(DLDevice{kDLCUDA, 1} == DLDevice{kDLCUDA, 1} && !(DLDevice{kDLCUDA, 1} == DLDevice{kDLCUDA, 0}));

TEST(Tensor, IsContiguousUnlessTold) {
  float data[24] = {};
  const Tensor tensor(data, float32, {2, 3, 4});
  EXPECT_TRUE(tensor.given());
  EXPECT_EQ(tensor.data(), data);
  EXPECT_TRUE(tensor.dtype() == float32);
  EXPECT_TRUE((tensor.device() == DLDevice{kDLCPU, 0}));
  ASSERT_EQ(tensor.ndim(), 3);
  EXPECT_EQ(tensor.size(0), 2);
  EXPECT_EQ(tensor.size(2), 4);
  EXPECT_EQ(tensor.size(-1), 4);
  EXPECT_EQ(tensor.size(-3), 2);
  EXPECT_EQ(tensor.stride(0), 12);
  EXPECT_EQ(tensor.stride(1), 4);
  EXPECT_EQ(tensor.stride(-1), 1);
  EXPECT_EQ(tensor.shape()[1], 3);
}

TEST(Tensor, HasTheStridesAndTheDeviceItIsGiven) {
  float data[24] = {};
  const Tensor tensor(data, bfloat16, {2, 3}, {-1, 8}, {kDLCUDA, 3});
  EXPECT_EQ(tensor.stride(0), -1);
  EXPECT_EQ(tensor.stride(-1), 8);
  EXPECT_TRUE((tensor.device() == DLDevice{kDLCUDA, 3}));
  EXPECT_TRUE(tensor.dtype() == bfloat16);
}

TEST(Tensor, TakesAShapeOfRunTimeLength) {
  const std::int64_t shape[] = {5, 0, 7};
  const Tensor tensor(nullptr, int32, shape, 3);
  EXPECT_TRUE(tensor.given()) << "a tensor without elements, or memory, is given too";
  EXPECT_EQ(tensor.size(1), 0);
  EXPECT_EQ(tensor.stride(1), 7);
  EXPECT_EQ(Tensor(nullptr, int32, shape, 0).ndim(), 0);
}

TEST(Tensor, ViewsADLPackTensor) {
  float data[100] = {};
  std::int64_t shape[] = {3, 5};
  std::int64_t strides[] = {7, 1};
  DLTensor source{};
  source.data = data;
  source.device = {kDLCPU, 0};
  source.ndim = 2;
  source.dtype = float32;
  source.shape = shape;
  source.strides = strides;
  source.byte_offset = 8;
  const Tensor strided(source);
  EXPECT_EQ(strided.data(), data + 2);
  EXPECT_EQ(strided.size(1), 5);
  EXPECT_EQ(strided.stride(0), 7);

  source.strides = nullptr;
  EXPECT_EQ(Tensor(source).stride(0), 5) << "no strides means contiguous";
  source.data = nullptr;
  EXPECT_EQ(Tensor(source).data(), nullptr);
}

TEST(Tensor, RefusesWhatItCannotHold) {
  const Tensor seven(nullptr, float32, {1, 2, 3, 4, 5, 6, 7});
  EXPECT_EQ(seven.ndim(), 7) << "for the message of the call that refuses it";
  try {
    Tensor(nullptr, float32, {1, 1}, {1});
    FAIL() << "one stride for two dimensions was taken";
  } catch (const Error& error) {
    EXPECT_EQ(error.kind(), ErrorKind::value);
    EXPECT_NE(std::string(error.what()).find("strides"), std::string::npos) << error.what();
  }
}

TEST(NumberFormats, RoundTripEveryNumber) {
  for (const DLDataType dtype : {float16, bfloat16, float8_e4m3fn}) {
    const testing::NumberFormat format = testing::format_of(dtype);
    for (std::uint32_t bits = 0; bits < (std::uint32_t{1} << dtype.bits); ++bits) {
      const double value = testing::decode(format, bits);
      if (std::isnan(value)) {
        EXPECT_TRUE(std::isnan(testing::rounded(dtype, value)));
      } else {
        ASSERT_EQ(testing::encode(format, value), bits);
      }
    }
  }
}

TEST(NumberFormats, HaveTheirLimits) {
  EXPECT_EQ(testing::rounded(float8_e4m3fn, 1e9), 448);
  EXPECT_EQ(testing::rounded(float8_e4m3fn, -std::numeric_limits<double>::infinity()), -448);
  EXPECT_EQ(testing::rounded(float8_e4m3fn, 0x1p-9), 0x1p-9);
  EXPECT_EQ(testing::rounded(float16, 65519), 65504);
  EXPECT_EQ(testing::rounded(float16, 65520), std::numeric_limits<double>::infinity());
  EXPECT_EQ(testing::rounded(float16, 0x1p-24), 0x1p-24);
  EXPECT_EQ(testing::rounded(float16, 1 + 0x1p-11), 1) << "ties go to even";
  EXPECT_EQ(testing::rounded(float16, 1 + 0x3p-11), 1 + 0x1p-9);
  for (const float value : {1.0F, -3.1415927F, 1e-42F, 3.4028235e38F}) {
    EXPECT_EQ(testing::rounded(float32, value), value);
    EXPECT_EQ(testing::rounded(bfloat16, value), testing::rounded(bfloat16, testing::rounded(bfloat16, value)));
  }
  EXPECT_EQ(testing::rounded(float32, 0.1), 0.1F);
}

}  // namespace
}  // namespace mate
