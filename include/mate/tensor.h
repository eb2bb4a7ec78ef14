#pragma once

#include <dlpack/dlpack.h>

#include <array>
#include <cstdint>
#include <initializer_list>

namespace mate {

inline constexpr DLDataType float32{kDLFloat, 32, 1};
inline constexpr DLDataType float16{kDLFloat, 16, 1};
inline constexpr DLDataType bfloat16{kDLBfloat, 16, 1};
inline constexpr DLDataType float8_e4m3fn{kDLFloat8_e4m3fn, 8, 1};
inline constexpr DLDataType int32{kDLInt, 32, 1};

constexpr bool operator==(const DLDataType& a, const DLDataType& b) {
  return a.code == b.code && a.bits == b.bits && a.lanes == b.lanes;
}
constexpr bool operator==(const DLDevice& a, const DLDevice& b) {
  return a.device_type == b.device_type && a.device_id == b.device_id;
}

/// A view of memory that somebody else owns: where it is, its element type, its shape and its strides (in
/// elements). A default-constructed view means "not given".
class Tensor {
 public:
  /// No call takes more dimensions. A view of more keeps the first of its extents, for the message that refuses it.
  static constexpr int max_ndim = 6;

  constexpr Tensor() = default;

  /// A contiguous (row-major) tensor. Inputs are never written to; that results point to memory which may be written is
  /// the caller's affair.
  Tensor(const void* data, DLDataType dtype, std::initializer_list<std::int64_t> shape, DLDevice device = {kDLCPU, 0});

  /// Any strides, in elements. Throws mate::Error (value) where shape and strides differ in length.
  Tensor(const void* data, DLDataType dtype, std::initializer_list<std::int64_t> shape,
         std::initializer_list<std::int64_t> strides, DLDevice device = {kDLCPU, 0});

  /// A contiguous tensor whose number of dimensions is known at run time.
  Tensor(const void* data, DLDataType dtype, const std::int64_t* shape, int ndim, DLDevice device = {kDLCPU, 0});

  /// The same view of a DLPack tensor, whose memory (shape and strides apart) it goes on pointing to.
  explicit Tensor(const DLTensor& tensor);

  constexpr bool given() const { return ndim_ >= 0; }
  constexpr void* data() const { return data_; }
  constexpr DLDataType dtype() const { return dtype_; }
  constexpr DLDevice device() const { return device_; }
  constexpr int ndim() const { return ndim_; }
  /// Extent of dimension i; a negative i counts from the end, as in Python.
  constexpr std::int64_t size(int i) const { return shape_[i < 0 ? i + ndim_ : i]; }
  /// Stride of dimension i in elements; a negative i counts from the end.
  constexpr std::int64_t stride(int i) const { return strides_[i < 0 ? i + ndim_ : i]; }
  constexpr const std::int64_t* shape() const { return shape_.data(); }

 private:
  void set_shape(const std::int64_t* shape, int ndim);
  void set_contiguous_strides();

  void* data_ = nullptr;
  DLDataType dtype_{};
  DLDevice device_{kDLCPU, 0};
  int ndim_ = -1;
  std::array<std::int64_t, max_ndim> shape_{};
  std::array<std::int64_t, max_ndim> strides_{};
};

}  // namespace mate
