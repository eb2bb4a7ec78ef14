// The checks that every call's arguments go through, each with a message that names the argument.
#pragma once

#include <mate/error.h>
#include <mate/tensor.h>

#include <cstdint>
#include <initializer_list>
#include <ostream>
#include <span>
#include <sstream>
#include <string>

namespace mate {

template <typename... Parts>
std::string join(const Parts&... parts) {
  std::ostringstream text;
  (text << ... << parts);
  return text.str();
}

template <typename... Parts>
[[noreturn]] void fail(ErrorKind kind, const Parts&... parts) {
  throw Error(kind, join(parts...));
}

template <typename... Parts>
void require(bool holds, const Parts&... parts) {
  if (!holds) [[unlikely]]
    fail(ErrorKind::value, parts...);
}

std::string name_of(DLDataType dtype);

/// Parts of a message that are put into words only where it is needed.
struct ShapeOf {
  const Tensor& tensor;
};
std::ostream& operator<<(std::ostream& text, const ShapeOf& shape);  ///< as Python prints it: (2, 3)
struct DeviceOf {
  const Tensor& tensor;
};
std::ostream& operator<<(std::ostream& text, const DeviceOf& device);  ///< as PyTorch prints it: cuda:0

void check_given(const char* name, const Tensor& tensor);
/// Where `name` is given, so is `partner`.
void check_partner(const char* name, const Tensor& tensor, const char* partner, bool partner_given);
/// A dtype that is an argument by itself.
void check_type(const char* name, DLDataType dtype, std::span<const DLDataType> allowed);
inline void check_dtype(const char* name, const Tensor& tensor, std::span<const DLDataType> allowed) {
  if (tensor.given()) check_type(name, tensor.dtype(), allowed);
}
inline void check_dtype(const char* name, const Tensor& tensor, std::initializer_list<DLDataType> allowed) {
  check_dtype(name, tensor, std::span(allowed.begin(), allowed.size()));
}
/// Memory that the host reads and writes, pinned or not.
bool is_host(DLDevice device);
/// A tensor is on the device of the first one, has no negative extent and, where it has elements, points somewhere.
void check_place(const char* name, const Tensor& tensor, const char* first_name, const Tensor& first);
/// No two elements of a tensor share memory.
void check_writable(const char* name, const Tensor& tensor);
/// `letters` is the shape as the documentation writes it: "(b, sq, h, d)".
void check_ndim(const char* name, const Tensor& tensor, int ndim, const char* letters);
void check_shape(const char* name, const Tensor& tensor, std::initializer_list<std::int64_t> shape,
                 const char* letters);
void check_shape(const char* name, const Tensor& tensor, const std::int64_t* shape, int ndim, const char* letters);
/// Rows, heads and pages are counted in 32 bits.
void check_extents(const char* name, const Tensor& tensor);
void check_contiguous_rows(const char* name, const Tensor& tensor);
/// A tensor does not share memory with another. One with gaps between its elements is given the benefit of the doubt,
/// unless both start at one place.
void check_disjoint(const char* name, const Tensor& tensor, const char* other_name, const Tensor& other);
void check_finite(const char* name, double value);
int checked_length(const char* name, std::int64_t value);

}  // namespace mate
