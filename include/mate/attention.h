/// The calls of MATE: exact attention with the meaning of FlashAttention-3's calls.
///
/// Letters: b batch, sq / sk query and key length of one sequence, h query heads, hk key heads (h % hk == 0; query
/// head i reads key head i / (h / hk)), d head size of q and k, dv head size of v; d and dv are any integers
/// from 1 to 512. Tensors may have any strides with a contiguous last dimension, and all live on one device.
/// Every function checks all of its arguments before it writes anything, and throws mate::Error: of kind `type` for a
/// wrong dtype, `value` for a wrong shape, value or combination, `not_implemented` for a device without a backend.
/// docs/flash_attention.md has the rules in full. Source of the method: https://arxiv.org/abs/2407.08608.
#pragma once

#include <mate/error.h>
#include <mate/tensor.h>
#include <mate/version.h>

#include <cstdint>
#include <optional>
#include <string>

namespace mate {

/// Arguments of attention(): every mode of the queries goes with every mode of the keys.
///
/// Types: q, k, v of float32 (CPU only), float16 or bfloat16, out alike; float8_e4m3fn with out bfloat16 or
/// float16; or q and qv bfloat16 or float16 over k and v float8_e4m3fn.
struct AttentionArguments {
  // What is multiplied.
  Tensor q = {};   ///< (b, sq, h, d), or (total_q, h, d) with cu_seqlens_q
  Tensor k = {};   ///< (b, sk, hk, d), (total_k, hk, d) with cu_seqlens_k, or (pages, page_size, hk, d) with page_table
  Tensor v = {};   ///< like k, with dv
  Tensor qv = {};  ///< like q, with dv: adds qv . v to the scores (multi-head latent attention)

  // Results.
  Tensor out = {};  ///< like q, with dv: required
  Tensor lse = {};  ///< float32 (b, h, sq), or (h, total_q) when ragged: natural log of each row's sum, where given

  // Lengths, int32. Rows of out past a length are written as 0, of lse as -inf.
  Tensor cu_seqlens_q = {};  ///< (b + 1,): queries are ragged, sequence i at rows [i] .. [i + 1]; needs max_seqlen_q
  Tensor cu_seqlens_k = {};  ///< (b + 1,): keys are ragged; needs max_seqlen_k
  Tensor seqused_q = {};     ///< (b,): only the first of a sequence's query rows are used
  Tensor seqused_k = {};     ///< (b,): keys in use, without those that are appended
  std::optional<std::int64_t> max_seqlen_q = {};
  std::optional<std::int64_t> max_seqlen_k = {};

  // The cache.
  Tensor page_table = {};        ///< int32 (b, max_pages): position t is row t % page_size of page [b][t / page_size]
  Tensor cache_batch_idx = {};   ///< int32 (b,): the row of the cache, or of the page table, that a sequence reads
  Tensor cache_leftpad = {};     ///< int32 (b,): where in its cache row a sequence starts
  Tensor k_new = {};             ///< (b, s_new, hk, d), or (total_new, hk, d) with cu_seqlens_k_new: appended in place
  Tensor v_new = {};             ///< like k_new, with dv
  Tensor cu_seqlens_k_new = {};  ///< int32 (b + 1,)
  Tensor rotary_cos = {};        ///< (seqlen_ro, rotary_dim / 2): rotates queries and new keys
  Tensor rotary_sin = {};
  Tensor rotary_seqlens = {};      ///< int32 (b,): position of the first new key; else seqused_k
  bool rotary_interleaved = true;  ///< pairs (0, 1), (2, 3) ...; else (0, rotary_dim / 2) ...

  // Scores.
  std::optional<double> softmax_scale = {};  ///< else (d + (qv given ? dv : 0)) ** -0.5
  bool causal = false;                       ///< aligned to the end of the keys
  std::int64_t window_left = -1;             ///< keys seen before the diagonal; negative: all
  std::int64_t window_right = -1;            ///< keys seen after the diagonal; negative: all
  std::int64_t attention_chunk = 0;          ///< > 0: only keys of the same chunk of this many positions
  double softcap = 0;                        ///< > 0: scores become softcap * tanh(score / softcap)
  Tensor q_descale = {};                     ///< float32 (b, hk), for float8_e4m3fn: scales q and qv
  Tensor k_descale = {};
  Tensor v_descale = {};
  Tensor learnable_sink = {};  ///< (h,), float32, float16 or bfloat16: a score that takes part in the sum only

  // Context parallel: this rank holds the keys whose global position is j * cp_world_size + cp_rank.
  std::int64_t cp_world_size = 1;
  std::int64_t cp_rank = 0;
  Tensor cp_tot_seqused_k = {};  ///< int32 (b,): keys of all ranks

  // How the work is cut: changes no result beyond rounding.
  std::int64_t num_splits = 0;        ///< parts that the keys are cut into; <= 0: the library decides
  std::optional<bool> pack_gqa = {};  ///< share a tile among the query heads of a group; absent: the library decides
  std::int64_t sm_margin = 0;         ///< leave that many multiprocessors (on the CPU: threads) free
  Tensor scheduler_metadata = {};     ///< from scheduler_metadata() of the same lengths
  bool batch_invariant = false;       ///< the bits of a sequence do not depend on the batch around it

  void* stream = nullptr;  ///< of tensors on a GPU: the CUstream that the call joins, without waiting for its results
};

/// Computes out (and lse) of
///
///     s[i,j]  = softmax_scale * (q[i] . k[j] + qv[i] . v[j]), capped, -inf where key j is hidden from row i
///     lse[i]  = log(sum_j exp(s[i,j]) + exp(sink))
///     out[i]  = sum_j exp(s[i,j] - lse[i]) * v[j]
///
/// A row that sees no key has out 0, and lse -inf (the sink where there is one). Throws mate::Error.
void attention(const AttentionArguments& arguments);

/// Arguments of combine().
struct CombineArguments {
  Tensor out_partial = {};  ///< float32 (splits, b, s, h, dv)
  Tensor lse_partial = {};  ///< float32 (splits, b, s, h), any strides
  Tensor out = {};          ///< (b, s, h, dv), float32, float16 or bfloat16; overlaps no input
  Tensor lse = {};          ///< float32 (b, s, h), any strides, where given
  void* stream = nullptr;   ///< of tensors on a GPU: the CUstream that the call joins
};

/// Merges partial results by their lse: lse = log(sum_i exp(lse_i)), out = sum_i exp(lse_i - lse) * out_i. A partial
/// whose lse is -inf is not read. Throws mate::Error.
void combine(const CombineArguments& arguments);

/// Arguments of scheduler_metadata(): the shapes and options of the attention() calls that will use it.
struct SchedulerMetadataArguments {
  std::int64_t batch_size = 0;
  std::int64_t max_seqlen_q = 0;  ///< query rows of each sequence, unless cu_seqlens_q or seqused_q say less
  std::int64_t max_seqlen_k = 0;
  std::int64_t num_heads_q = 0;
  std::int64_t num_heads_kv = 0;
  std::int64_t headdim = 0;
  std::optional<std::int64_t> headdim_v = {};  ///< else headdim
  DLDataType qkv_dtype = bfloat16;
  std::optional<DLDataType> kv_dtype = {};  ///< else qkv_dtype
  Tensor seqused_k = {};                    ///< int32 (b,): cache_seqlens; this or cu_seqlens_k is required
  Tensor cu_seqlens_q = {};                 ///< int32 (b + 1,)
  Tensor cu_seqlens_k = {};                 ///< int32 (b + 1,)
  Tensor cu_seqlens_k_new = {};             ///< int32 (b + 1,)
  Tensor seqused_q = {};                    ///< int32 (b,)
  Tensor cache_leftpad = {};                ///< int32 (b,)
  std::optional<std::int64_t> page_size = {};
  std::int64_t max_seqlen_k_new = 0;  ///< keys appended to each sequence, unless cu_seqlens_k_new says otherwise
  bool causal = false;
  std::int64_t window_left = -1;
  std::int64_t window_right = -1;
  std::int64_t attention_chunk = 0;
  bool has_softcap = false;
  bool has_qv = false;
  std::int64_t num_splits = 0;
  std::optional<bool> pack_gqa = {};
  std::int64_t sm_margin = 0;
  std::int64_t cp_world_size = 1;
  std::int64_t cp_rank = 0;
  Tensor cp_tot_seqused_k = {};
  bool batch_invariant = false;
  Tensor out = {};         ///< int32 (scheduler_metadata_size(batch_size),): required
  void* stream = nullptr;  ///< of tensors on a GPU: the CUstream that the call joins
};

/// Number of int32 elements of the metadata of a batch.
std::int64_t scheduler_metadata_size(std::int64_t batch_size);

/// Decides how attention() calls with these lengths will be cut, once for all the layers of a model. A call with it
/// gives bit for bit what it gives without. Throws mate::Error.
void scheduler_metadata(const SchedulerMetadataArguments& arguments);

/// What this machine has, as one line of text for each backend: its instruction set or devices.
std::string describe_backends();

}  // namespace mate
