// Numbers and tensors for tests: the number formats written out from their definitions, and memory of exactly
// the bytes that a tensor spans, so that AddressSanitizer sees every step outside.
#pragma once

#include <mate/tensor.h>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>
#include <memory>
#include <vector>

namespace mate::testing {

/// A binary floating-point format.
struct NumberFormat {
  int exponent_bits;
  int mantissa_bits;
  bool infinities;  ///< else the one NaN has all bits set, and what is too large saturates

  constexpr int bias() const { return (1 << (exponent_bits - 1)) - 1; }
  constexpr std::uint32_t sign() const { return std::uint32_t{1} << (exponent_bits + mantissa_bits); }
  constexpr std::uint32_t infinity() const { return ((std::uint32_t{1} << exponent_bits) - 1) << mantissa_bits; }
  constexpr std::uint32_t nan() const {
    return infinities ? infinity() | std::uint32_t{1} << (mantissa_bits - 1) : sign() - 1;
  }
};

constexpr NumberFormat format_of(DLDataType dtype) {
  if (dtype == float16) return {5, 10, true};
  if (dtype == bfloat16) return {8, 7, true};
  if (dtype == float8_e4m3fn) return {4, 3, false};
  return {8, 23, true};
}

inline double decode(NumberFormat format, std::uint32_t bits) {
  const double sign = (bits & format.sign()) != 0 ? -1 : 1;
  bits &= format.sign() - 1;
  if (format.infinities ? bits > format.infinity() : bits == format.nan()) {
    return std::numeric_limits<double>::quiet_NaN();
  }
  if (format.infinities && bits == format.infinity()) return sign * std::numeric_limits<double>::infinity();
  const int exponent = static_cast<int>(bits >> format.mantissa_bits);
  const std::uint32_t one = std::uint32_t{1} << format.mantissa_bits;
  const std::uint32_t mantissa = (bits & (one - 1)) | (exponent > 0 ? one : 0);
  return sign * std::ldexp(mantissa, std::max(exponent, 1) - format.bias() - format.mantissa_bits);
}

/// The nearest number of the format, ties to even.
inline std::uint32_t encode(NumberFormat format, double x) {
  if (std::isnan(x)) return format.nan();
  const std::uint32_t sign = std::signbit(x) ? format.sign() : 0;
  x = std::abs(x);
  const std::uint32_t largest = format.infinities ? format.infinity() : format.nan() - 1;
  if (std::isinf(x)) return sign | largest;
  if (x == 0) return sign;
  const int exponent = std::max(std::ilogb(x), 1 - format.bias());
  if (exponent > format.bias() + 1) return sign | largest;
  const double ulps = std::nearbyint(std::ldexp(x, format.mantissa_bits - exponent));
  const std::uint32_t bits = (static_cast<std::uint32_t>(exponent + format.bias() - 1) << format.mantissa_bits) +
                             static_cast<std::uint32_t>(ulps);
  return sign | std::min(bits, largest);
}

inline double rounded(DLDataType dtype, double x) { return decode(format_of(dtype), encode(format_of(dtype), x)); }

inline int bytes_per_element(const Tensor& tensor) { return tensor.dtype().bits / 8; }

/// Where an element lies, by its index in each dimension.
template <typename... Index>
std::byte* address(const Tensor& tensor, Index... index) {
  std::int64_t offset = 0;
  int dimension = 0;
  ((offset += static_cast<std::int64_t>(index) * tensor.stride(dimension++)), ...);
  return static_cast<std::byte*>(tensor.data()) + offset * bytes_per_element(tensor);
}

/// The bits of the element at an address.
inline std::uint32_t bits_at(const Tensor& tensor, const std::byte* at) {
  std::uint32_t bits = 0;
  std::memcpy(&bits, at, bytes_per_element(tensor));
  return bits;
}

inline double read_at(const Tensor& tensor, const std::byte* at) {
  const std::uint32_t bits = bits_at(tensor, at);
  return tensor.dtype() == int32 ? static_cast<std::int32_t>(bits) : decode(format_of(tensor.dtype()), bits);
}

inline void write_at(const Tensor& tensor, std::byte* at, double x) {
  const std::uint32_t bits = tensor.dtype() == int32 ? static_cast<std::uint32_t>(static_cast<std::int32_t>(x))
                                                     : encode(format_of(tensor.dtype()), x);
  std::memcpy(at, &bits, bytes_per_element(tensor));
}

/// Reads an element of any type, int32 too.
template <typename... Index>
double read(const Tensor& tensor, Index... index) {
  return read_at(tensor, address(tensor, index...));
}

/// Writes an element, rounded to the tensor's type.
template <typename... Index>
void write(const Tensor& tensor, double x, Index... index) {
  write_at(tensor, address(tensor, index...), x);
}

/// Calls visit(address) for every element, in row-major order.
template <typename Visit>
void for_each_element(const Tensor& tensor, Visit visit, int dimension = 0, std::int64_t offset = 0) {
  if (dimension == tensor.ndim()) {
    visit(static_cast<std::byte*>(tensor.data()) + offset * bytes_per_element(tensor));
    return;
  }
  for (std::int64_t i = 0; i < tensor.size(dimension); ++i) {
    for_each_element(tensor, visit, dimension + 1, offset + i * tensor.stride(dimension));
  }
}

/// Sets every element to next().
template <typename Next>
void fill(const Tensor& tensor, Next next) {
  for_each_element(tensor, [&](std::byte* at) { write_at(tensor, at, next()); });
}

/// The elements' bits, in row-major order.
inline std::vector<std::uint32_t> bits_of(const Tensor& tensor) {
  std::vector<std::uint32_t> bits;
  for_each_element(tensor, [&](const std::byte* at) { bits.push_back(bits_at(tensor, at)); });
  return bits;
}

inline Tensor view(const Tensor& like, void* data, std::vector<std::int64_t> shape, std::vector<std::int64_t> strides) {
  DLTensor tensor{};
  tensor.data = data;
  tensor.device = like.device();
  tensor.ndim = static_cast<int>(shape.size());
  tensor.dtype = like.dtype();
  tensor.shape = shape.data();
  tensor.strides = strides.data();
  return Tensor(tensor);
}

/// Element `index` of the first dimension.
inline Tensor slice(const Tensor& tensor, std::int64_t index) {
  std::vector<std::int64_t> shape, strides;
  for (int i = 1; i < tensor.ndim(); ++i) {
    shape.push_back(tensor.size(i));
    strides.push_back(tensor.stride(i));
  }
  return view(tensor, address(tensor, index), shape, strides);
}

/// Owns the memory of a test's tensors, and tells what a call wrote where it must not.
class Memory {
 public:
  /// A tensor whose memory begins and ends with its elements, full of NaN (int32: -1). Without elements it
  /// has none.
  Tensor tensor(DLDataType dtype, const std::vector<std::int64_t>& shape, const std::vector<std::int64_t>& strides) {
    std::int64_t lowest = 0;
    std::int64_t highest = 0;
    bool empty = false;
    for (std::size_t i = 0; i < shape.size(); ++i) {
      const std::int64_t reach = (shape[i] - 1) * strides[i];
      (reach < 0 ? lowest : highest) += reach;
      empty = empty || shape[i] == 0;
    }
    const Tensor like(nullptr, dtype, {});
    if (empty) return view(like, nullptr, shape, strides);
    Block& block = blocks_.emplace_back();
    block.size = (highest - lowest + 1) * bytes_per_element(like);
    block.data = std::make_unique<std::byte[]>(block.size);
    std::memset(block.data.get(), 0xff, block.size);
    return view(like, block.data.get() - lowest * bytes_per_element(like), shape, strides);
  }

  /// A contiguous one.
  Tensor tensor(DLDataType dtype, const std::vector<std::int64_t>& shape) {
    std::vector<std::int64_t> strides(shape.size());
    std::int64_t stride = 1;
    for (std::size_t i = shape.size(); i-- > 0;) {
      strides[i] = stride;
      stride *= shape[i];
    }
    return tensor(dtype, shape, strides);
  }

  /// A contiguous int32 tensor that holds these values.
  Tensor integers(const std::vector<std::int64_t>& values) {
    const Tensor result = tensor(int32, {static_cast<std::int64_t>(values.size())});
    for (std::size_t i = 0; i < values.size(); ++i) write(result, static_cast<double>(values[i]), i);
    return result;
  }

  /// Takes note of all memory as it is now.
  void remember() {
    for (Block& block : blocks_) block.remembered.assign(block.data.get(), block.data.get() + block.size);
  }

  /// Permits what was written to one element since then.
  void permit(const Tensor& tensor, const std::byte* at) {
    for (Block& block : blocks_) {
      if (at < block.data.get() || at >= block.data.get() + block.size) continue;
      std::memcpy(block.remembered.data() + (at - block.data.get()), at, bytes_per_element(tensor));
    }
  }
  void permit(const Tensor& tensor) {
    if (!tensor.given()) return;
    for_each_element(tensor, [&](const std::byte* at) { permit(tensor, at); });
  }

  /// Whether all the rest is as it was.
  bool unchanged() const {
    for (const Block& block : blocks_) {
      if (std::memcmp(block.data.get(), block.remembered.data(), block.size) != 0) return false;
    }
    return true;
  }

 private:
  struct Block {
    std::unique_ptr<std::byte[]> data;
    std::size_t size = 0;
    std::vector<std::byte> remembered;
  };
  std::vector<Block> blocks_;
};

}  // namespace mate::testing
