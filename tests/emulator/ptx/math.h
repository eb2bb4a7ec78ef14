#pragma once

namespace mate::cuda::ptx {

inline float exp2_approximately(float x) { return std::exp2(x); }
inline float log2_approximately(float x) { return std::log2(x); }
inline float reciprocal_approximately(float x) { return 1 / x; }

}  // namespace mate::cuda::ptx
