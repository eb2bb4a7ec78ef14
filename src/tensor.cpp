#include <mate/error.h>
#include <mate/tensor.h>

#include <algorithm>
#include <string>

namespace mate {

Tensor::Tensor(const void* data, DLDataType dtype, std::initializer_list<std::int64_t> shape, DLDevice device)
    : Tensor(data, dtype, shape.begin(), static_cast<int>(shape.size()), device) {}

Tensor::Tensor(const void* data, DLDataType dtype, const std::int64_t* shape, int ndim, DLDevice device)
    : data_(const_cast<void*>(data)), dtype_(dtype), device_(device) {
  set_shape(shape, ndim);
  set_contiguous_strides();
}

Tensor::Tensor(const void* data, DLDataType dtype, std::initializer_list<std::int64_t> shape,
               std::initializer_list<std::int64_t> strides, DLDevice device)
    : data_(const_cast<void*>(data)), dtype_(dtype), device_(device) {
  if (shape.size() != strides.size()) {
    throw Error(ErrorKind::value, "strides must have one entry for each of the " + std::to_string(shape.size()) +
                                      " dimensions, got " + std::to_string(strides.size()));
  }
  set_shape(shape.begin(), static_cast<int>(shape.size()));
  std::copy_n(strides.begin(), std::min(ndim_, max_ndim), strides_.begin());
}

Tensor::Tensor(const DLTensor& tensor)
    : data_(tensor.data == nullptr ? nullptr : static_cast<char*>(tensor.data) + tensor.byte_offset),
      dtype_(tensor.dtype),
      device_(tensor.device) {
  set_shape(tensor.shape, tensor.ndim);
  if (tensor.strides == nullptr) {
    set_contiguous_strides();
  } else {
    std::copy_n(tensor.strides, std::min(ndim_, max_ndim), strides_.begin());
  }
}

void Tensor::set_shape(const std::int64_t* shape, int ndim) {
  ndim_ = std::max(ndim, 0);
  std::copy_n(shape, std::min(ndim_, max_ndim), shape_.begin());
}

void Tensor::set_contiguous_strides() {
  std::int64_t stride = 1;
  for (int i = std::min(ndim_, max_ndim) - 1; i >= 0; --i) {
    strides_[i] = stride;
    stride *= shape_[i];
  }
}

}  // namespace mate
