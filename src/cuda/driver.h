// The CUDA driver, reached by dlopen: no CUDA header or library is needed to build or to load MATE.
//
// Types, constants and functions have the names, values and signatures of cuda.h, so that NVIDIA's documentation of the
// driver API explains them.
#pragma once

#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>

#include "dynamic_library.h"

namespace mate::cuda {

enum CUresult : int {
  CUDA_SUCCESS = 0,
  CUDA_ERROR_INVALID_VALUE = 1,
};

using CUdevice = int;
using CUdeviceptr = unsigned long long;
using CUcontext = struct CUctx_st*;
using CUstream = struct CUstream_st*;
using CUlibrary = struct CUlib_st*;
using CUkernel = struct CUkern_st*;
using CUfunction = struct CUfunc_st*;

enum CUdevice_attribute : int {
  CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT = 16,
  CU_DEVICE_ATTRIBUTE_L2_CACHE_SIZE = 38,
  CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR = 75,
  CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR = 76,
};

enum CUfunction_attribute : int {
  CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES = 8,
};

enum CUstreamCaptureStatus : int {
  CU_STREAM_CAPTURE_STATUS_NONE = 0,
};

enum CUstreamCaptureMode : int {
  CU_STREAM_CAPTURE_MODE_RELAXED = 2,
};

enum CUstream_flags : unsigned {
  CU_STREAM_NON_BLOCKING = 1,
};

enum CUlaunchAttributeID : int {
  CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION = 4,
  CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION = 6,
};

union CUlaunchAttributeValue {
  std::byte pad[64];
  struct {
    unsigned x, y, z;
  } clusterDim;
  int programmaticStreamSerializationAllowed;
};

struct CUlaunchAttribute {
  CUlaunchAttributeID id;
  alignas(8) CUlaunchAttributeValue value;
};
static_assert(sizeof(CUlaunchAttribute) == 72 && offsetof(CUlaunchAttribute, value) == 8);

struct CUlaunchConfig {
  unsigned gridDimX, gridDimY, gridDimZ;
  unsigned blockDimX, blockDimY, blockDimZ;
  unsigned sharedMemBytes;
  CUstream hStream;
  const CUlaunchAttribute* attrs;
  unsigned numAttrs;
};

enum CUtensorMapDataType : int {
  CU_TENSOR_MAP_DATA_TYPE_UINT8 = 0,
  CU_TENSOR_MAP_DATA_TYPE_UINT16 = 1,
};
enum CUtensorMapInterleave : int { CU_TENSOR_MAP_INTERLEAVE_NONE = 0 };
enum CUtensorMapSwizzle : int { CU_TENSOR_MAP_SWIZZLE_128B = 3 };
enum CUtensorMapL2promotion : int { CU_TENSOR_MAP_L2_PROMOTION_L2_128B = 2, CU_TENSOR_MAP_L2_PROMOTION_L2_256B = 3 };
enum CUtensorMapFloatOOBfill : int { CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE = 0 };

/// What the driver refused.
class DriverError : public std::runtime_error {
 public:
  DriverError(const char* function, CUresult result);
};

template <typename Signature>
class DriverFunction;

/// A function of the driver.
template <typename... Parameters>
class DriverFunction<CUresult(Parameters...)> {
 public:
  DriverFunction(void* library, const char* name) : name_(name), address_(LibraryFunction(library, name)) {}

  /// Throws DriverError unless the function succeeds.
  void operator()(Parameters... parameters) const {
    const CUresult result = address_(parameters...);
    if (result != CUDA_SUCCESS) [[unlikely]]
      throw DriverError(name_, result);
  }

  CUresult result_of(Parameters... parameters) const { return address_(parameters...); }

 private:
  const char* name_;
  CUresult (*address_)(Parameters...);
};

/// The functions of libcuda.so.1 that MATE calls. CUDA 12.0 has all of them.
struct Driver {
  void* library;

  DriverFunction<CUresult(unsigned flags)> cuInit{library, "cuInit"};
  DriverFunction<CUresult(CUresult error, const char** name)> cuGetErrorName{library, "cuGetErrorName"};
  DriverFunction<CUresult(CUresult error, const char** text)> cuGetErrorString{library, "cuGetErrorString"};
  DriverFunction<CUresult(int* version)> cuDriverGetVersion{library, "cuDriverGetVersion"};

  DriverFunction<CUresult(int* count)> cuDeviceGetCount{library, "cuDeviceGetCount"};
  DriverFunction<CUresult(CUdevice* device, int ordinal)> cuDeviceGet{library, "cuDeviceGet"};
  DriverFunction<CUresult(char* name, int size, CUdevice device)> cuDeviceGetName{library, "cuDeviceGetName"};
  DriverFunction<CUresult(int* value, CUdevice_attribute attribute, CUdevice device)> cuDeviceGetAttribute{
      library, "cuDeviceGetAttribute"};
  DriverFunction<CUresult(CUcontext* context, CUdevice device)> cuDevicePrimaryCtxRetain{library,
                                                                                         "cuDevicePrimaryCtxRetain"};

  DriverFunction<CUresult(CUcontext* context)> cuCtxGetCurrent{library, "cuCtxGetCurrent"};
  DriverFunction<CUresult(CUdevice* device)> cuCtxGetDevice{library, "cuCtxGetDevice"};
  DriverFunction<CUresult(CUcontext context, unsigned long long* id)> cuCtxGetId{library, "cuCtxGetId"};
  DriverFunction<CUresult(CUcontext context)> cuCtxPushCurrent{library, "cuCtxPushCurrent_v2"};
  DriverFunction<CUresult(CUcontext* context)> cuCtxPopCurrent{library, "cuCtxPopCurrent_v2"};

  DriverFunction<CUresult(CUlibrary* library, const void* code, int* jit_options, void** jit_option_values,
                          unsigned jit_option_count, int* library_options, void** library_option_values,
                          unsigned library_option_count)>
      cuLibraryLoadData{library, "cuLibraryLoadData"};
  DriverFunction<CUresult(CUkernel* kernel, CUlibrary library, const char* name)> cuLibraryGetKernel{
      library, "cuLibraryGetKernel"};
  DriverFunction<CUresult(CUfunction* function, CUkernel kernel)> cuKernelGetFunction{library, "cuKernelGetFunction"};
  DriverFunction<CUresult(CUfunction_attribute attribute, int value, CUkernel kernel, CUdevice device)>
      cuKernelSetAttribute{library, "cuKernelSetAttribute"};
  DriverFunction<CUresult(const CUlaunchConfig* config, CUfunction function, void** parameters, void** extra)>
      cuLaunchKernelEx{library, "cuLaunchKernelEx"};

  DriverFunction<CUresult(void* map, CUtensorMapDataType type, std::uint32_t rank, void* address,
                          const std::uint64_t* dims, const std::uint64_t* strides, const std::uint32_t* box,
                          const std::uint32_t* element_strides, CUtensorMapInterleave interleave,
                          CUtensorMapSwizzle swizzle, CUtensorMapL2promotion promotion, CUtensorMapFloatOOBfill fill)>
      cuTensorMapEncodeTiled{library, "cuTensorMapEncodeTiled"};

  DriverFunction<CUresult(CUdeviceptr* address, std::size_t bytes)> cuMemAlloc{library, "cuMemAlloc_v2"};
  DriverFunction<CUresult(CUdeviceptr* address, std::size_t bytes, CUstream stream)> cuMemAllocAsync{library,
                                                                                                     "cuMemAllocAsync"};
  DriverFunction<CUresult(CUdeviceptr address, CUstream stream)> cuMemFreeAsync{library, "cuMemFreeAsync"};
  DriverFunction<CUresult(CUdeviceptr address, unsigned value, std::size_t count, CUstream stream)> cuMemsetD32Async{
      library, "cuMemsetD32Async"};
  DriverFunction<CUresult(void* to, CUdeviceptr from, std::size_t bytes, CUstream stream)> cuMemcpyDtoHAsync{
      library, "cuMemcpyDtoHAsync_v2"};

  DriverFunction<CUresult(CUstream* stream, unsigned flags)> cuStreamCreate{library, "cuStreamCreate"};
  DriverFunction<CUresult(CUstream stream)> cuStreamDestroy{library, "cuStreamDestroy_v2"};
  DriverFunction<CUresult(CUstream stream)> cuStreamSynchronize{library, "cuStreamSynchronize"};
  DriverFunction<CUresult(CUstream stream, unsigned long long* id)> cuStreamGetId{library, "cuStreamGetId"};
  DriverFunction<CUresult(CUstream stream, CUstreamCaptureStatus* status)> cuStreamIsCapturing{library,
                                                                                               "cuStreamIsCapturing"};
  DriverFunction<CUresult(CUstreamCaptureMode* mode)> cuThreadExchangeStreamCaptureMode{
      library, "cuThreadExchangeStreamCaptureMode"};
};

/// The driver, initialised; null where this machine has none that can be used.
const Driver* find_driver();

/// Why find_driver() found none.
const std::string& why_no_driver();

/// The driver. Throws Error (not_implemented) where there is none.
const Driver& driver();

/// While it lives, this thread may load code and get memory although some stream is capturing a graph: neither becomes
/// part of the graph.
class AllowDuringCapture {
 public:
  AllowDuringCapture();
  ~AllowDuringCapture();
  AllowDuringCapture(const AllowDuringCapture&) = delete;
  AllowDuringCapture& operator=(const AllowDuringCapture&) = delete;

 private:
  CUstreamCaptureMode mode_ = CU_STREAM_CAPTURE_MODE_RELAXED;
};

}  // namespace mate::cuda
