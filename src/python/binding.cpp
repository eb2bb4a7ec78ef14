// The functions that python/mate calls, through tvm-ffi: each takes the fields of a call of python/mate/_calls.py in
// their order, then its results.
#include <mate/attention.h>
#include <tvm/ffi/container/array.h>
#include <tvm/ffi/container/tensor.h>
#include <tvm/ffi/container/tuple.h>
#include <tvm/ffi/extra/c_env_api.h>
#include <tvm/ffi/function.h>
#include <tvm/ffi/optional.h>
#include <tvm/ffi/string.h>

#include <array>
#include <cstdint>
#include <functional>
#include <new>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "attention/arguments.h"
#include "attention/check.h"
#include "cuda/compiler.h"
#include "cuda/kernel_cache.h"
#include "cuda/variants.h"

namespace {

namespace ffi = tvm::ffi;
using OptionalTensor = ffi::Optional<ffi::TensorView>;
using OptionalInt = ffi::Optional<std::int64_t>;

mate::Tensor view(const ffi::TensorView& tensor) {
  return mate::Tensor(DLTensor{tensor.data_ptr(), tensor.device(), tensor.ndim(), tensor.dtype(),
                               const_cast<std::int64_t*>(tensor.shape().data()),
                               const_cast<std::int64_t*>(tensor.strides().data()), tensor.byte_offset()});
}

mate::Tensor view(const OptionalTensor& tensor) { return tensor.has_value() ? view(tensor.value()) : mate::Tensor(); }

template <typename T>
std::optional<T> optional(const ffi::Optional<T>& value) {
  return value.has_value() ? std::optional<T>(value.value()) : std::nullopt;
}

/// The stream on which the caller's framework works with a tensor's device.
void* stream_of(const ffi::TensorView& tensor) {
  const DLDevice device = tensor.device();
  return device.device_type == kDLCUDA ? TVMFFIEnvGetStream(device.device_type, device.device_id) : nullptr;
}

void* stream_of(const OptionalTensor& tensor) { return tensor.has_value() ? stream_of(tensor.value()) : nullptr; }

const char* python_exception(mate::ErrorKind kind) {
  switch (kind) {
    case mate::ErrorKind::type:
      return "TypeError";
    case mate::ErrorKind::value:
      return "ValueError";
    case mate::ErrorKind::not_implemented:
      return "NotImplementedError";
  }
  return "RuntimeError";
}

/// Runs `call`, and hands its errors on to Python as the exceptions of their kind.
template <typename Call>
void with_python_errors(const Call& call) {
  try {
    call();
  } catch (const mate::Error& error) {
    throw ffi::Error(python_exception(error.kind()), error.what(), "");
  } catch (const std::bad_alloc&) {
    throw ffi::Error("MemoryError", "MATE could not get the memory that the call needs", "");
  } catch (const std::runtime_error& error) {
    throw ffi::Error("RuntimeError", error.what(), "");
  }
}

/// Makes a result by the allocator of the caller's framework, one of whose tensors it becomes when it is returned.
mate::Allocate allocate_into(ffi::Optional<ffi::Tensor>& result) {
  return [&result](DLDataType dtype, DLDevice device, const std::int64_t* shape, int ndim) {
    result = ffi::Tensor::FromEnvAlloc(TVMFFIEnvTensorAlloc, ffi::ShapeView(shape, ndim), dtype, device);
    return mate::Tensor(*result.value().GetDLTensorPtr());
  };
}

/// Gives memory of the caller's framework, and lets it go with the end of its own life.
class ScratchAllocator {
 public:
  mate::Tensor operator()(DLDataType dtype, DLDevice device, const std::int64_t* shape, int ndim) {
    taken_.push_back(ffi::Tensor::FromEnvAlloc(TVMFFIEnvTensorAlloc, ffi::ShapeView(shape, ndim), dtype, device));
    return mate::Tensor(*taken_.back().GetDLTensorPtr());
  }

 private:
  std::vector<ffi::Tensor> taken_;
};

/// The names of flash_attn_with_kvcache and get_scheduler_metadata, and of flash_attn_qkvpacked_func.
constexpr mate::ArgumentNames cache_names{"q", "k_cache", "v_cache", "k", "v", "cache_seqlens"};
constexpr mate::ArgumentNames packed_names{"qkv", "qkv", "qkv"};
/// By the index that python/mate/_calls.py gives.
constexpr mate::ArgumentNames argument_names[] = {{}, cache_names, packed_names};

/// Returns out where it was not given.
ffi::Optional<ffi::Tensor> attention(
    std::int64_t names, ffi::TensorView q, ffi::TensorView k, ffi::TensorView v, OptionalTensor qv,
    ffi::Optional<double> softmax_scale, bool causal, std::int64_t window_left, std::int64_t window_right,
    std::int64_t attention_chunk, double softcap, OptionalTensor q_descale, OptionalTensor k_descale,
    OptionalTensor v_descale, OptionalTensor learnable_sink, std::int64_t cp_world_size, std::int64_t cp_rank,
    OptionalTensor cp_tot_seqused_k, std::int64_t num_splits, ffi::Optional<bool> pack_gqa, std::int64_t sm_margin,
    bool batch_invariant, OptionalTensor cu_seqlens_q, OptionalTensor cu_seqlens_k, OptionalTensor seqused_q,
    OptionalTensor seqused_k, OptionalInt max_seqlen_q, OptionalInt max_seqlen_k, OptionalTensor page_table,
    OptionalTensor scheduler_metadata, OptionalTensor cache_batch_idx, OptionalTensor cache_leftpad,
    OptionalTensor k_new, OptionalTensor v_new, OptionalTensor cu_seqlens_k_new, OptionalTensor rotary_cos,
    OptionalTensor rotary_sin, OptionalTensor rotary_seqlens, bool rotary_interleaved, OptionalTensor out,
    OptionalTensor lse) {
  ffi::Optional<ffi::Tensor> result;
  ScratchAllocator scratch;
  with_python_errors([&] {
    mate::attention(
        {
            .q = view(q),
            .k = view(k),
            .v = view(v),
            .qv = view(qv),
            .out = view(out),
            .lse = view(lse),
            .cu_seqlens_q = view(cu_seqlens_q),
            .cu_seqlens_k = view(cu_seqlens_k),
            .seqused_q = view(seqused_q),
            .seqused_k = view(seqused_k),
            .max_seqlen_q = optional(max_seqlen_q),
            .max_seqlen_k = optional(max_seqlen_k),
            .page_table = view(page_table),
            .cache_batch_idx = view(cache_batch_idx),
            .cache_leftpad = view(cache_leftpad),
            .k_new = view(k_new),
            .v_new = view(v_new),
            .cu_seqlens_k_new = view(cu_seqlens_k_new),
            .rotary_cos = view(rotary_cos),
            .rotary_sin = view(rotary_sin),
            .rotary_seqlens = view(rotary_seqlens),
            .rotary_interleaved = rotary_interleaved,
            .softmax_scale = optional(softmax_scale),
            .causal = causal,
            .window_left = window_left,
            .window_right = window_right,
            .attention_chunk = attention_chunk,
            .softcap = softcap,
            .q_descale = view(q_descale),
            .k_descale = view(k_descale),
            .v_descale = view(v_descale),
            .learnable_sink = view(learnable_sink),
            .cp_world_size = cp_world_size,
            .cp_rank = cp_rank,
            .cp_tot_seqused_k = view(cp_tot_seqused_k),
            .num_splits = num_splits,
            .pack_gqa = optional(pack_gqa),
            .sm_margin = sm_margin,
            .scheduler_metadata = view(scheduler_metadata),
            .batch_invariant = batch_invariant,
            .stream = stream_of(q),
        },
        argument_names[names], {allocate_into(result), std::ref(scratch)});
  });
  return result;
}

void combine(ffi::TensorView out_partial, ffi::TensorView lse_partial, OptionalTensor out, OptionalTensor lse) {
  with_python_errors([&] {
    mate::combine({
        .out_partial = view(out_partial),
        .lse_partial = view(lse_partial),
        .out = view(out),
        .lse = view(lse),
        .stream = stream_of(out_partial),
    });
  });
}

ffi::Optional<ffi::Tensor> scheduler_metadata(
    std::int64_t batch_size, std::int64_t max_seqlen_q, std::int64_t max_seqlen_k, std::int64_t num_heads_q,
    std::int64_t num_heads_kv, std::int64_t headdim, OptionalInt headdim_v, DLDataType qkv_dtype,
    ffi::Optional<DLDataType> kv_dtype, OptionalTensor cache_seqlens, OptionalTensor cu_seqlens_q,
    OptionalTensor cu_seqlens_k, OptionalTensor cu_seqlens_k_new, OptionalTensor seqused_q,
    OptionalTensor cache_leftpad, OptionalInt page_size, std::int64_t max_seqlen_k_new, bool causal,
    std::int64_t window_left, std::int64_t window_right, std::int64_t attention_chunk, bool has_softcap, bool has_qv,
    std::int64_t num_splits, ffi::Optional<bool> pack_gqa, std::int64_t sm_margin, std::int64_t cp_world_size,
    std::int64_t cp_rank, OptionalTensor cp_tot_seqused_k, bool batch_invariant, OptionalTensor out) {
  ffi::Optional<ffi::Tensor> result;
  with_python_errors([&] {
    mate::scheduler_metadata(
        {
            .batch_size = batch_size,
            .max_seqlen_q = max_seqlen_q,
            .max_seqlen_k = max_seqlen_k,
            .num_heads_q = num_heads_q,
            .num_heads_kv = num_heads_kv,
            .headdim = headdim,
            .headdim_v = optional(headdim_v),
            .qkv_dtype = qkv_dtype,
            .kv_dtype = optional(kv_dtype),
            .seqused_k = view(cache_seqlens),
            .cu_seqlens_q = view(cu_seqlens_q),
            .cu_seqlens_k = view(cu_seqlens_k),
            .cu_seqlens_k_new = view(cu_seqlens_k_new),
            .seqused_q = view(seqused_q),
            .cache_leftpad = view(cache_leftpad),
            .page_size = optional(page_size),
            .max_seqlen_k_new = max_seqlen_k_new,
            .causal = causal,
            .window_left = window_left,
            .window_right = window_right,
            .attention_chunk = attention_chunk,
            .has_softcap = has_softcap,
            .has_qv = has_qv,
            .num_splits = num_splits,
            .pack_gqa = optional(pack_gqa),
            .sm_margin = sm_margin,
            .cp_world_size = cp_world_size,
            .cp_rank = cp_rank,
            .cp_tot_seqused_k = view(cp_tot_seqused_k),
            .batch_invariant = batch_invariant,
            .out = view(out),
            .stream = stream_of(cache_seqlens.has_value() ? cache_seqlens : cu_seqlens_k),
        },
        cache_names, allocate_into(result));
  });
  return result;
}

ffi::String describe_backends() {
  ffi::String description;
  with_python_errors([&] { description = mate::describe_backends(); });
  return description;
}

using NameAndText = ffi::Tuple<ffi::String, ffi::String>;

/// The GPU kernels that calls of these head sizes and types, of q, of k and v and of out, may need.
ffi::Array<NameAndText> kernel_sources(std::int64_t head_dim, std::int64_t head_dim_v, DLDataType dtype,
                                       DLDataType kv_dtype, DLDataType out_dtype, bool softcap, bool qv) {
  ffi::Array<NameAndText> sources;
  with_python_errors([&] {
    mate::check_type("dtype", dtype, std::array{mate::bfloat16, mate::float16, mate::float8_e4m3fn});
    const bool narrow = dtype == mate::float8_e4m3fn;
    using Allowed = std::vector<DLDataType>;
    mate::check_type("kv_dtype", kv_dtype, narrow ? Allowed{dtype} : Allowed{dtype, mate::float8_e4m3fn});
    mate::check_type("out_dtype", out_dtype, narrow ? Allowed{mate::bfloat16, mate::float16} : Allowed{dtype});
    const mate::cuda::TensorTypes types{mate::element_type(dtype), mate::element_type(kv_dtype),
                                        mate::element_type(out_dtype)};
    const auto checked = [](const char* name, std::int64_t value) {
      mate::require(value >= 1 && value <= mate::max_head_dim, name, " must be from 1 to ", mate::max_head_dim,
                    ", got ", value);
      return static_cast<int>(value);
    };
    const int d = checked("head_dim", head_dim);
    const int dv = checked("head_dim_v", head_dim_v);
    for (const mate::cuda::KernelSource& source : mate::cuda::kernels_for(d, dv, types, softcap, qv)) {
      sources.push_back(NameAndText(source.name, source.text));
    }
  });
  return sources;
}

/// Compiles a kernel into the cache. Whether that was needed.
bool compile_kernel(const ffi::String& name, const ffi::String& text) {
  bool compiled = false;
  with_python_errors([&] { compiled = mate::cuda::cached_kernel({.name = name, .text = text}).compiled; });
  return compiled;
}

void set_compiler_folders(const ffi::Array<ffi::String>& folders) {
  mate::cuda::set_compiler_folders(std::vector<std::string>(folders.begin(), folders.end()));
}

}  // namespace

TVM_FFI_DLL_EXPORT_TYPED_FUNC(attention, attention)
TVM_FFI_DLL_EXPORT_TYPED_FUNC(combine, combine)
TVM_FFI_DLL_EXPORT_TYPED_FUNC(scheduler_metadata, scheduler_metadata)
TVM_FFI_DLL_EXPORT_TYPED_FUNC(describe_backends, describe_backends)
TVM_FFI_DLL_EXPORT_TYPED_FUNC(kernel_sources, kernel_sources)
TVM_FFI_DLL_EXPORT_TYPED_FUNC(compile_kernel, compile_kernel)
TVM_FFI_DLL_EXPORT_TYPED_FUNC(set_compiler_folders, set_compiler_folders)
TVM_FFI_DLL_EXPORT_TYPED_FUNC(version, [] { return ffi::String(MATE_VERSION); })
