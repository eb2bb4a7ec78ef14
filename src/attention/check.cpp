#include "check.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <vector>

#include "visibility.h"

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
  for (int i = 0; i < std::min(tensor.ndim(), Tensor::max_ndim); ++i) text << (i ? ", " : "") << tensor.size(i);
  if (tensor.ndim() > Tensor::max_ndim) text << ", ...";
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

void check_type(const char* name, DLDataType dtype, std::span<const DLDataType> allowed) {
  for (const DLDataType& other : allowed) {
    if (dtype == other) return;
  }
  std::string names;
  for (const DLDataType& other : allowed) names += (names.empty() ? "" : " or ") + name_of(other);
  fail(ErrorKind::type, name, " must be ", names, ", got ", name_of(dtype));
}

bool is_host(DLDevice device) {
  return device.device_type == kDLCPU || device.device_type == kDLCUDAHost || device.device_type == kDLROCMHost;
}

void check_place(const char* name, const Tensor& tensor, const char* first_name, const Tensor& first) {
  if (!tensor.given()) return;
  const bool together = tensor.device() == first.device() || (is_host(tensor.device()) && is_host(first.device()));
  require(together, name, " is on ", DeviceOf{tensor}, " and ", first_name, " on ", DeviceOf{first},
          ": all tensors of a call must be on one device");
  bool empty = false;
  for (int i = 0; i < std::min(tensor.ndim(), Tensor::max_ndim); ++i) {
    require(tensor.size(i) >= 0, name, " must not have a negative extent, got shape ", ShapeOf{tensor});
    empty |= tensor.size(i) == 0;
  }
  require(empty || tensor.data() != nullptr, name, " must point to memory, got a null pointer");
}

void check_writable(const char* name, const Tensor& tensor) {
  for (int i = 0; i < tensor.ndim(); ++i) {
    if (tensor.size(i) == 0) return;
  }
  for (int i = 0; i < tensor.ndim(); ++i) {
    require(tensor.size(i) <= 1 || tensor.stride(i) != 0, name,
            " must not be broadcast, since it is written to, got stride 0 in dimension ", i);
  }
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
    require(tensor.size(i) <= max_length, name, " must have fewer than 2**31 rows, pages and heads, got shape ",
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

namespace {

/// Bytes of a tensor, from the first to the one behind the last.
struct Extent {
  std::int64_t begin, end;
};

/// By how much bytes of two tensors may lie apart: any of lowest .. highest times so many.
struct Step {
  std::int64_t bytes, lowest, highest;
};

/// Whether so many of each of the steps, the longest of which come first, make up a distance. Steps of a tensor reach
/// further than all shorter ones, mostly, so that few numbers are to be tried; where more than `tries` are, perhaps.
bool may_make_up(const Step* step, const Step* end, std::int64_t distance, int& tries) {
  if (step == end) return distance == 0;
  if (--tries < 0) return true;
  std::int64_t least = 0;
  std::int64_t most = 0;
  for (const Step* shorter = step + 1; shorter < end; ++shorter) {
    least += shorter->lowest * shorter->bytes;
    most += shorter->highest * shorter->bytes;
  }
  const auto floor = [&](std::int64_t x) { return x / step->bytes - (x % step->bytes < 0); };
  const std::int64_t last = std::min(step->highest, floor(distance - least));
  for (std::int64_t n = std::max(step->lowest, -floor(most - distance)); n <= last; ++n) {
    if (may_make_up(step + 1, end, distance - n * step->bytes, tries)) return true;
  }
  return false;
}

/// Whether some byte is that of both tensors.
bool may_overlap(const Tensor& a, const Tensor& b) {
  std::vector<Step> steps;
  // Offsets of `a` count, those of `b` are taken from them; negative ones the other way round.
  const auto add = [&](std::int64_t bytes, std::int64_t count, bool of_a) {
    if (bytes == 0 || count <= 1) return;
    const bool forwards = of_a == (bytes > 0);
    const Step step{std::abs(bytes), forwards ? 0 : 1 - count, forwards ? count - 1 : 0};
    const auto same = std::find_if(steps.begin(), steps.end(), [&](const Step& x) { return x.bytes == step.bytes; });
    if (same == steps.end()) {
      steps.push_back(step);
    } else {
      same->lowest += step.lowest;
      same->highest += step.highest;
    }
  };
  for (const Tensor* t : {&a, &b}) {
    const std::int64_t bytes = t->dtype().bits / 8;
    add(1, bytes, t == &a);
    for (int i = 0; i < t->ndim(); ++i) add(t->stride(i) * bytes, t->size(i), t == &a);
  }
  std::sort(steps.begin(), steps.end(), [](const Step& x, const Step& y) { return x.bytes > y.bytes; });
  const auto distance = reinterpret_cast<std::intptr_t>(b.data()) - reinterpret_cast<std::intptr_t>(a.data());
  int tries = 100'000;
  return may_make_up(steps.data(), steps.data() + steps.size(), distance, tries);
}

}  // namespace

void check_disjoint(const char* name, const Tensor& tensor, const char* other_name, const Tensor& other) {
  if (!tensor.given() || !other.given()) return;
  const auto extent_of = [](const Tensor& t) {
    std::int64_t first = 0, last = 0;
    for (int i = 0; i < t.ndim(); ++i) {
      if (t.size(i) == 0) return Extent{0, 0};
      const std::int64_t reach = (t.size(i) - 1) * t.stride(i);
      (reach < 0 ? first : last) += reach;
    }
    const std::int64_t bytes = t.dtype().bits / 8;
    const auto data = reinterpret_cast<std::intptr_t>(t.data());
    return Extent{data + first * bytes, data + (last + 1) * bytes};
  };
  const Extent a = extent_of(tensor);
  const Extent b = extent_of(other);
  if (a.begin == a.end || b.begin == b.end || a.end <= b.begin || b.end <= a.begin) return;
  require(!may_overlap(tensor, other), name, " must not overlap ", other_name);
}

void check_finite(const char* name, double value) {
  require(std::isfinite(value) && std::isfinite(static_cast<float>(value)), name, " must be a finite float32, got ",
          value);
}

int checked_length(const char* name, std::int64_t value) {
  require(value >= 0 && value <= max_length, name, " must be from 0 to 2**31 - 1, got ", value);
  return static_cast<int>(value);
}

}  // namespace mate
