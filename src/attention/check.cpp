#include "check.h"

#include <algorithm>
#include <cmath>

namespace mate {

std::string name_of(DLDataType dtype) {
  const std::string bits = std::to_string(dtype.bits);
  std::string name;
  switch (dtype.code) {
    case kDLInt:
      name = "int" + bits;
      break;
    case kDLUInt:
      name = "uint" + bits;
      break;
    case kDLFloat:
      name = "float" + bits;
      break;
    case kDLBfloat:
      name = "bfloat" + bits;
      break;
    case kDLComplex:
      name = "complex" + bits;
      break;
    case kDLBool:
      name = "bool";
      break;
    case kDLFloat8_e4m3fn:
      name = "float8_e4m3fn";
      break;
    case kDLFloat8_e4m3fnuz:
      name = "float8_e4m3fnuz";
      break;
    case kDLFloat8_e5m2:
      name = "float8_e5m2";
      break;
    default:
      name = "the dtype of DLPack code " + std::to_string(dtype.code) + " and " + bits + " bits";
  }
  return dtype.lanes == 1 ? name : name + "x" + std::to_string(dtype.lanes);
}

std::ostream& operator<<(std::ostream& text, const ShapeOf& shape) {
  const Tensor& tensor = shape.tensor;
  text << "(";
  for (int i = 0; i < tensor.ndim(); ++i) text << (i ? ", " : "") << tensor.size(i);
  return text << (tensor.ndim() == 1 ? ",)" : ")");
}

std::ostream& operator<<(std::ostream& text, const DeviceOf& device) {
  const auto [type, id] = device.tensor.device();
  switch (type) {
    case kDLCPU:
      return text << "cpu";
    case kDLCUDA:
      text << "cuda";
      break;
    case kDLROCM:
      text << "rocm";
      break;
    case kDLMetal:
      text << "mps";
      break;
    default:
      text << "DLPack device type " << type;
  }
  return text << ":" << id;
}

void check_given(const char* name, const Tensor& tensor) { require(tensor.given(), name, " is required"); }

void check_partner(const char* name, const Tensor& tensor, const char* partner, bool partner_given) {
  require(!tensor.given() || partner_given, name, " needs ", partner, ", which is missing");
}

void check_dtype(const char* name, const Tensor& tensor, std::initializer_list<DLDataType> allowed) {
  if (!tensor.given()) return;
  for (const DLDataType& dtype : allowed) {
    if (tensor.dtype() == dtype) return;
  }
  std::string names;
  for (const DLDataType& dtype : allowed) names += (names.empty() ? "" : " or ") + name_of(dtype);
  fail(ErrorKind::type, name, " must be ", names, ", got ", name_of(tensor.dtype()));
}

void check_device(const char* name, const Tensor& tensor, const char* first_name, const Tensor& first) {
  require(!tensor.given() || tensor.device() == first.device(), name, " is on ", DeviceOf{tensor}, " and ", first_name,
          " on ", DeviceOf{first}, ": all tensors of a call must be on one device");
}

void check_memory(const char* name, const Tensor& tensor) {
  if (!tensor.given() || tensor.data() != nullptr) return;
  const std::int64_t* end = tensor.shape() + tensor.ndim();
  require(std::find(tensor.shape(), end, 0) != end, name, " must point to memory, got a null pointer");
}

void check_ndim(const char* name, const Tensor& tensor, int ndim, const char* letters) {
  require(tensor.ndim() == ndim, name, " must have ", ndim, " dimensions, ", letters, ", got shape ", ShapeOf{tensor});
}

void check_shape(const char* name, const Tensor& tensor, std::initializer_list<std::int64_t> shape,
                 const char* letters) {
  check_shape(name, tensor, shape.begin(), static_cast<int>(shape.size()), letters);
}

void check_shape(const char* name, const Tensor& tensor, const std::int64_t* shape, int ndim, const char* letters) {
  if (!tensor.given()) return;
  if (tensor.ndim() == ndim && std::equal(shape, shape + ndim, tensor.shape())) return;
  const Tensor expected(nullptr, float32, shape, ndim);
  fail(ErrorKind::value, name, " must have shape ", letters, " = ", ShapeOf{expected}, ", got ", ShapeOf{tensor});
}

void check_extents(const char* name, const Tensor& tensor) {
  for (int i = 0; i < tensor.ndim(); ++i) {
    require(tensor.size(i) <= max_extent, name, " must have fewer than 2**31 rows, pages and heads, got shape ",
            ShapeOf{tensor});
  }
}

void check_contiguous_rows(const char* name, const Tensor& tensor) {
  if (!tensor.given()) return;
  for (int i = 0; i < tensor.ndim() - 1; ++i) {
    if (tensor.size(i) == 0) return;
  }
  require(tensor.size(-1) <= 1 || tensor.stride(-1) == 1, name, " must have a contiguous last dimension, got stride ",
          tensor.stride(-1));
}

void check_disjoint(const char* name, const Tensor& tensor, const char* other_name, const Tensor& other) {
  // The bytes that a tensor spans where they are all its own, else 0: of a tensor with gaps nothing is said.
  const auto bytes = [](const Tensor& t) {
    std::int64_t elements = 1;
    std::int64_t span = 1;
    for (int i = 0; i < t.ndim(); ++i) {
      elements *= t.size(i);
      span += (t.size(i) - 1) * t.stride(i);
    }
    return span == elements ? span * t.dtype().bits / 8 : 0;
  };
  const auto begin = reinterpret_cast<std::uintptr_t>(tensor.data());
  const auto other_begin = reinterpret_cast<std::uintptr_t>(other.data());
  require(begin + bytes(tensor) <= other_begin || other_begin + bytes(other) <= begin, name, " must not overlap ",
          other_name);
}

void check_finite(const char* name, double value) {
  require(std::isfinite(value) && std::isfinite(static_cast<float>(value)), name, " must be a finite float32, got ",
          value);
}

int checked_length(const char* name, std::int64_t value) {
  require(value >= 0 && value <= max_extent, name, " must be from 0 to 2**31 - 1, got ", value);
  return static_cast<int>(value);
}

}  // namespace mate
