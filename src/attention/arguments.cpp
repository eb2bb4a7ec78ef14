#include "arguments.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <span>
#include <tuple>
#include <utility>

#include "check.h"
#include "tiling.h"

namespace mate {
namespace {

// Stands for the memory of a tensor without elements, which may have none: a null pointer means "not given".
constexpr int no_elements = 0;

void* memory_of(const Tensor& tensor) {
  if (!tensor.given()) return nullptr;
  return tensor.data() != nullptr ? tensor.data() : const_cast<int*>(&no_elements);
}

/// An int32 (extent,) argument, checked.
IntVector int_vector(const char* name, const Tensor& tensor, std::int64_t extent, const char* letters) {
  check_dtype(name, tensor, {int32});
  check_shape(name, tensor, {extent}, letters);
  if (!tensor.given()) return {};
  return {static_cast<const int*>(memory_of(tensor)), tensor.stride(0)};
}

/// (slot, row, head, element), or (row, head, element).
Rows rows_of(const Tensor& tensor) {
  if (!tensor.given()) return {};
  Rows rows;
  rows.data = memory_of(tensor);
  rows.type = element_type(tensor.dtype());
  rows.slot_stride = tensor.ndim() == 4 ? tensor.stride(0) : 0;
  rows.row_stride = tensor.stride(-3);
  rows.head_stride = tensor.stride(-2);
  return rows;
}

LogSumExp log_sum_exp(const Tensor& tensor, std::int64_t slot_stride, std::int64_t head_stride,
                      std::int64_t row_stride) {
  return {static_cast<float*>(memory_of(tensor)), slot_stride, head_stride, row_stride};
}

Descale descale_of(const char* name, const Tensor& tensor, const Problem& problem, const Tensor& q) {
  if (!tensor.given()) return {};
  check_place(name, tensor, "q", q);
  check_dtype(name, tensor, {float32});
  check_shape(name, tensor, {problem.batch, problem.heads_k}, "(b, hk)");
  return {static_cast<const float*>(memory_of(tensor)), tensor.stride(0), tensor.stride(1)};
}

Sink sink_of(const AttentionArguments& a, int heads_q) {
  if (!a.learnable_sink.given()) return {};
  check_dtype("learnable_sink", a.learnable_sink, {float32, float16, bfloat16});
  check_shape("learnable_sink", a.learnable_sink, {heads_q}, "(h,)");
  return {memory_of(a.learnable_sink), element_type(a.learnable_sink.dtype()), a.learnable_sink.stride(0)};
}

/// Bounds that exceed every length are as good as 2**31 - 1, and fit an int.
int bound(std::int64_t value) { return value < 0 ? -1 : static_cast<int>(std::min<std::int64_t>(value, max_length)); }

template <typename Arguments>
Mask mask_of(const Arguments& a) {
  require(a.cp_world_size >= 1 && a.cp_world_size <= max_length, "cp_world_size must be from 1 to 2**31 - 1, got ",
          a.cp_world_size);
  require(a.cp_rank >= 0 && a.cp_rank < a.cp_world_size,
          "cp_rank must be from 0 to cp_world_size - 1 = ", a.cp_world_size - 1, ", got ", a.cp_rank);
  require(a.cp_world_size == 1 || a.cp_tot_seqused_k.given(), "cp_world_size ", a.cp_world_size,
          " needs cp_tot_seqused_k, which is missing");
  Mask mask;
  mask.left = bound(a.window_left);
  mask.right = a.causal ? 0 : bound(a.window_right);
  mask.chunk = std::max(0, bound(a.attention_chunk));
  mask.cp_world = static_cast<int>(a.cp_world_size);
  mask.cp_rank = static_cast<int>(a.cp_rank);
  return mask;
}

template <typename Arguments>
void set_options(Problem& problem, const Arguments& a) {
  require(a.num_splits <= max_splits, "num_splits must be at most ", max_splits, ", got ", a.num_splits);
  require(a.sm_margin >= 0, "sm_margin must not be negative, got ", a.sm_margin);
  problem.mask = mask_of(a);
  problem.num_splits = static_cast<int>(std::max<std::int64_t>(a.num_splits, 0));
  problem.pack_gqa = a.pack_gqa ? int{*a.pack_gqa} : -1;
  problem.sm_margin = bound(a.sm_margin);
  problem.batch_invariant = a.batch_invariant;
}

void check_heads(const char* heads_q_name, std::int64_t heads_q, const char* heads_k_name, std::int64_t heads_k) {
  require(heads_k >= 1, heads_k_name, " must have at least one head, got ", heads_k);
  require(heads_q % heads_k == 0, heads_q_name, " has ", heads_q, " heads, which must be a multiple of the ", heads_k,
          " of ", heads_k_name);
}

void check_head_dim(const char* name, std::int64_t head_dim) {
  require(head_dim >= 1 && head_dim <= max_head_dim, name, " must have a head size from 1 to ", max_head_dim, ", got ",
          head_dim);
}

constexpr DLDataType query_types[] = {bfloat16, float16, float32, float8_e4m3fn};

/// The types of k and v that go with queries of a type; new keys and values come in either.
std::span<const DLDataType> key_types(DLDataType q) {
  static constexpr DLDataType types[][2] = {
      {bfloat16, float8_e4m3fn}, {float16, float8_e4m3fn}, {float32}, {float8_e4m3fn}};
  if (q == bfloat16) return types[0];
  if (q == float16) return types[1];
  return std::span(types[q == float32 ? 2 : 3], 1);
}

void check_types(const AttentionArguments& a, const ArgumentNames& names) {
  const DLDataType q = a.q.dtype();
  check_dtype(names.q, a.q, query_types);
  check_dtype(names.k, a.k, key_types(q));
  check_dtype(names.v, a.v, {a.k.dtype()});
  check_dtype("qv", a.qv, {q});
  for (const auto& [name, tensor] : {std::pair{names.k_new, &a.k_new}, {names.v_new, &a.v_new}}) {
    if (q == a.k.dtype()) {
      check_dtype(name, *tensor, {q});
    } else {
      check_dtype(name, *tensor, {q, a.k.dtype()});
    }
  }
  if (a.k_new.given()) check_dtype(names.v_new, a.v_new, {a.k_new.dtype()});
  if (q == float8_e4m3fn) {
    check_dtype("out", a.out, {bfloat16, float16});
  } else {
    check_dtype("out", a.out, {q});
  }
  check_dtype("lse", a.lse, {float32});
}

void check_places(const AttentionArguments& a, const ArgumentNames& names) {
  const std::tuple<const char*, const Tensor*> tensors[] = {{names.q, &a.q},
                                                            {names.k, &a.k},
                                                            {names.v, &a.v},
                                                            {"qv", &a.qv},
                                                            {"out", &a.out},
                                                            {"lse", &a.lse},
                                                            {"cu_seqlens_q", &a.cu_seqlens_q},
                                                            {"cu_seqlens_k", &a.cu_seqlens_k},
                                                            {"seqused_q", &a.seqused_q},
                                                            {names.seqused_k, &a.seqused_k},
                                                            {"page_table", &a.page_table},
                                                            {"cache_batch_idx", &a.cache_batch_idx},
                                                            {"cache_leftpad", &a.cache_leftpad},
                                                            {names.k_new, &a.k_new},
                                                            {names.v_new, &a.v_new},
                                                            {"cu_seqlens_k_new", &a.cu_seqlens_k_new},
                                                            {"rotary_cos", &a.rotary_cos},
                                                            {"rotary_sin", &a.rotary_sin},
                                                            {"rotary_seqlens", &a.rotary_seqlens},
                                                            {"learnable_sink", &a.learnable_sink},
                                                            {"scheduler_metadata", &a.scheduler_metadata}};
  for (const auto& [name, tensor] : tensors) {
    check_place(name, *tensor, names.q, a.q);
  }
  if (a.cp_world_size > 1) check_place("cp_tot_seqused_k", a.cp_tot_seqused_k, names.q, a.q);
}

void set_queries(Problem& problem, const AttentionArguments& a, const ArgumentNames& names) {
  if (a.cu_seqlens_q.given()) {
    check_ndim("cu_seqlens_q", a.cu_seqlens_q, 1, "(b + 1,)");
    require(a.cu_seqlens_q.size(0) >= 1, "cu_seqlens_q must have shape (b + 1,), got (0,)");
    require(a.max_seqlen_q.has_value(), "max_seqlen_q is required with cu_seqlens_q");
    check_ndim(names.q, a.q, 3, "(total_q, h, d), with cu_seqlens_q");
  } else {
    check_ndim(names.q, a.q, 4, "(b, sq, h, d), without cu_seqlens_q");
  }
  check_extents(names.q, a.q);
  check_head_dim(names.q, a.q.size(-1));
  check_contiguous_rows(names.q, a.q);
  if (a.max_seqlen_q) problem.max_seqlen_q = checked_length("max_seqlen_q", *a.max_seqlen_q);
  problem.batch = static_cast<int>(a.cu_seqlens_q.given() ? a.cu_seqlens_q.size(0) - 1 : a.q.size(0));
  problem.heads_q = static_cast<int>(a.q.size(-2));
  problem.head_dim = static_cast<int>(a.q.size(-1));
  problem.q = rows_of(a.q);
  problem.queries.rows = static_cast<int>(a.q.size(-3));
  problem.queries.cu_seqlens = int_vector("cu_seqlens_q", a.cu_seqlens_q, problem.batch + 1, "(b + 1,)");
  problem.queries.seqused = int_vector("seqused_q", a.seqused_q, problem.batch, "(b,)");
}

void set_keys(Problem& problem, const AttentionArguments& a, const ArgumentNames& names) {
  KeyLayout& keys = problem.keys;
  require(!a.page_table.given() || !a.cu_seqlens_k.given(),
          "page_table and cu_seqlens_k were both given: keys are either paged or ragged");
  if (a.cu_seqlens_k.given()) {
    check_ndim(names.k, a.k, 3, "(total_k, hk, d), with cu_seqlens_k");
    require(a.max_seqlen_k.has_value(), "max_seqlen_k is required with cu_seqlens_k");
    require(!a.cache_batch_idx.given(), "cache_batch_idx needs a cache, and cu_seqlens_k makes the keys ragged");
    require(!a.cache_leftpad.given(), "cache_leftpad needs a cache, and cu_seqlens_k makes the keys ragged");
    require(!a.k_new.given(), names.k_new, " needs a cache to be appended to, and cu_seqlens_k makes the keys ragged");
  } else if (a.page_table.given()) {
    check_ndim(names.k, a.k, 4, "(num_pages, page_size, hk, d), with page_table");
    require(a.k.size(1) >= 1, names.k, " must have a page size of at least 1, got shape ", ShapeOf{a.k});
  } else {
    check_ndim(names.k, a.k, 4, "(b, sk, hk, d), without cu_seqlens_k and page_table");
    require(a.k.size(0) == problem.batch || a.cache_batch_idx.given(), names.k, " must have batch size ", problem.batch,
            " as the queries, got shape ", ShapeOf{a.k});
  }
  check_extents(names.k, a.k);
  check_heads(names.q, problem.heads_q, names.k, a.k.size(-2));
  require(a.k.size(-1) == problem.head_dim, names.k, " must have the head size of q, ", problem.head_dim,
          ", got shape ", ShapeOf{a.k});
  require(a.v.ndim() == a.k.ndim() && std::equal(a.k.shape(), a.k.shape() + a.k.ndim() - 1, a.v.shape()), names.v,
          " must have the shape of ", names.k, ", ", ShapeOf{a.k}, ", but for the head size, got ", ShapeOf{a.v});
  check_head_dim(names.v, a.v.size(-1));
  check_contiguous_rows(names.k, a.k);
  check_contiguous_rows(names.v, a.v);
  if (a.max_seqlen_k) problem.max_seqlen_k = checked_length("max_seqlen_k", *a.max_seqlen_k);

  problem.heads_k = static_cast<int>(a.k.size(-2));
  problem.head_dim_v = static_cast<int>(a.v.size(-1));
  problem.k = rows_of(a.k);
  problem.v = rows_of(a.v);
  keys.rows = static_cast<int>(a.k.size(-3));
  keys.slots = a.k.ndim() == 4 ? static_cast<int>(a.k.size(0)) : 1;
  keys.cu_seqlens = int_vector("cu_seqlens_k", a.cu_seqlens_k, problem.batch + 1, "(b + 1,)");
  keys.seqused = int_vector(names.seqused_k, a.seqused_k, problem.batch, "(b,)");
  keys.batch_index = int_vector("cache_batch_idx", a.cache_batch_idx, problem.batch, "(b,)");
  keys.leftpad = int_vector("cache_leftpad", a.cache_leftpad, problem.batch, "(b,)");
  if (problem.mask.cp_world > 1) {
    keys.cp_total = int_vector("cp_tot_seqused_k", a.cp_tot_seqused_k, problem.batch, "(b,)");
  }
  if (a.page_table.given()) {
    check_dtype("page_table", a.page_table, {int32});
    check_ndim("page_table", a.page_table, 2, "(b, max_pages)");
    check_extents("page_table", a.page_table);
    check_contiguous_rows("page_table", a.page_table);
    require(a.page_table.size(0) == problem.batch || a.cache_batch_idx.given(), "page_table must have batch size ",
            problem.batch, " as the queries, got shape ", ShapeOf{a.page_table});
    keys.page_table = static_cast<const int*>(memory_of(a.page_table));
    keys.page_table_stride = a.page_table.stride(0);
    keys.page_rows = static_cast<int>(a.page_table.size(0));
    keys.table_capacity = table_capacity_of(a.page_table.size(1), keys.rows);
  }
}

void set_qv(Problem& problem, const AttentionArguments& a) {
  if (!a.qv.given()) return;
  require(a.qv.ndim() == a.q.ndim() && std::equal(a.q.shape(), a.q.shape() + a.q.ndim() - 1, a.qv.shape()) &&
              a.qv.size(-1) == problem.head_dim_v,
          "qv must have the shape of q, ", ShapeOf{a.q}, ", with the head size of v, ", problem.head_dim_v, ", got ",
          ShapeOf{a.qv});
  check_contiguous_rows("qv", a.qv);
  problem.qv = rows_of(a.qv);
}

void set_appended(Problem& problem, const AttentionArguments& a, const ArgumentNames& names) {
  check_partner(names.k_new, a.k_new, names.v_new, a.v_new.given());
  check_partner(names.v_new, a.v_new, names.k_new, a.k_new.given());
  // Serving engines pass cu_seqlens_k_new and rotary_seqlens without new keys too: there they mean nothing.
  if (!a.k_new.given()) return;
  check_partner(names.k_new, a.k_new, names.seqused_k, a.seqused_k.given());
  KeyLayout& keys = problem.keys;
  keys.appends = true;
  if (a.cu_seqlens_k_new.given()) {
    check_ndim(names.k_new, a.k_new, 3, "(total_new, hk, d), with cu_seqlens_k_new");
    check_extents(names.k_new, a.k_new);
    check_shape(names.k_new, a.k_new, {a.k_new.size(0), problem.heads_k, problem.head_dim}, "(total_new, hk, d)");
    check_shape(names.v_new, a.v_new, {a.k_new.size(0), problem.heads_k, problem.head_dim_v}, "(total_new, hk, dv)");
    keys.cu_seqlens_new = int_vector("cu_seqlens_k_new", a.cu_seqlens_k_new, problem.batch + 1, "(b + 1,)");
  } else {
    check_ndim(names.k_new, a.k_new, 4, "(b, s_new, hk, d), without cu_seqlens_k_new");
    check_extents(names.k_new, a.k_new);
    const std::int64_t rows = a.k_new.size(1);
    check_shape(names.k_new, a.k_new, {problem.batch, rows, problem.heads_k, problem.head_dim}, "(b, s_new, hk, d)");
    check_shape(names.v_new, a.v_new, {problem.batch, rows, problem.heads_k, problem.head_dim_v}, "(b, s_new, hk, dv)");
  }
  check_writable(names.k, a.k);
  check_writable(names.v, a.v);
  check_contiguous_rows(names.k_new, a.k_new);
  check_contiguous_rows(names.v_new, a.v_new);
  keys.new_rows = static_cast<int>(a.k_new.size(-3));
  problem.k_new = rows_of(a.k_new);
  problem.v_new = rows_of(a.v_new);
}

void set_rotary(Problem& problem, const AttentionArguments& a, const ArgumentNames& names) {
  check_partner("rotary_cos", a.rotary_cos, "rotary_sin", a.rotary_sin.given());
  check_partner("rotary_sin", a.rotary_sin, "rotary_cos", a.rotary_cos.given());
  if (!a.rotary_cos.given()) return;
  check_partner("rotary_cos", a.rotary_cos, names.k_new, a.k_new.given());
  require(problem.mask.cp_world == 1,
          "rotary_cos must not be given with cp_world_size > 1: a rank does not know where its new keys stand");
  check_dtype("rotary_cos", a.rotary_cos, {a.q.dtype(), bfloat16, float16, float32});
  check_dtype("rotary_sin", a.rotary_sin, {a.rotary_cos.dtype()});
  check_ndim("rotary_cos", a.rotary_cos, 2, "(seqlen_ro, rotary_dim / 2)");
  check_extents("rotary_cos", a.rotary_cos);
  check_shape("rotary_sin", a.rotary_sin, {a.rotary_cos.size(0), a.rotary_cos.size(1)}, "(seqlen_ro, rotary_dim / 2)");
  const std::int64_t dim = 2 * a.rotary_cos.size(1);
  require(dim >= 1 && dim <= problem.head_dim && dim % 16 == 0,
          "rotary_cos must have a rotary_dim that is a multiple of 16, at most the head size ", problem.head_dim,
          ", got ", dim);
  require(a.rotary_cos.size(0) >= 1, "rotary_cos must have at least one position, got shape ", ShapeOf{a.rotary_cos});
  check_contiguous_rows("rotary_cos", a.rotary_cos);
  check_contiguous_rows("rotary_sin", a.rotary_sin);
  problem.keys.rotary_seqlens = int_vector("rotary_seqlens", a.rotary_seqlens, problem.batch, "(b,)");
  Rotary& rotary = problem.rotary;
  rotary.cos = memory_of(a.rotary_cos);
  rotary.sin = memory_of(a.rotary_sin);
  rotary.type = element_type(a.rotary_cos.dtype());
  rotary.cos_stride = a.rotary_cos.stride(0);
  rotary.sin_stride = a.rotary_sin.stride(0);
  rotary.rows = static_cast<int>(a.rotary_cos.size(0));
  rotary.dim = static_cast<int>(dim);
  rotary.interleaved = a.rotary_interleaved;
  rotary.queries_advance = problem.mask.bounded();
}

/// Lengths that follow from shapes alone.
void check_known_lengths(const Problem& problem, const ArgumentNames& names) {
  const KeyLayout& keys = problem.keys;
  if (problem.batch == 0) return;
  if (!problem.ragged_queries() && !problem.queries.seqused.given()) {
    require(problem.queries.rows <= problem.max_seqlen_q, "max_seqlen_q must be at least ", problem.queries.rows,
            ", the rows of ", names.q, ", got ", problem.max_seqlen_q);
  }
  if (keys.cu_seqlens.given()) return;
  const int capacity = key_capacity(keys, 0);  // as any sequence's
  if (!keys.seqused.given() && !keys.leftpad.given()) {
    require(capacity <= problem.max_seqlen_k, "max_seqlen_k must be at least ", capacity, ", the keys that ",
            keys.paged() ? "page_table" : names.k, " has room for, got ", problem.max_seqlen_k);
  }
  if (keys.appends && !keys.cu_seqlens_new.given()) {
    require(keys.new_rows <= capacity, names.k_new, " must fit the cache, which has ", capacity, " rows, got ",
            keys.new_rows);
  }
}

/// The shape of out; without the leading dimension when queries are ragged.
std::array<std::int64_t, 4> out_shape(const Problem& problem) {
  return {problem.batch, problem.queries.rows, problem.heads_q, problem.head_dim_v};
}

void set_results(Problem& problem, const AttentionArguments& a, const ArgumentNames& names) {
  const bool ragged = problem.ragged_queries();
  const std::int64_t lse_shape[] = {problem.batch, problem.heads_q, problem.queries.rows};
  check_shape("out", a.out, out_shape(problem).data() + ragged, 4 - ragged,
              ragged ? "(total_q, h, dv)" : "(b, sq, h, dv)");
  check_shape("lse", a.lse, lse_shape + ragged, 3 - ragged, ragged ? "(h, total_q)" : "(b, h, sq)");
  check_contiguous_rows("out", a.out);
  for (const auto& [name, result] : {std::pair{"out", &a.out}, {"lse", &a.lse}}) {
    check_writable(name, *result);
    for (const auto& [input_name, input] : {std::pair{names.q, &a.q},
                                            {names.k, &a.k},
                                            {names.v, &a.v},
                                            {"qv", &a.qv},
                                            {names.k_new, &a.k_new},
                                            {names.v_new, &a.v_new}}) {
      check_disjoint(name, *result, input_name, *input);
    }
  }
  check_disjoint("lse", a.lse, "out", a.out);
  if (a.out.given()) problem.out = rows_of(a.out);
  if (a.lse.given()) {
    problem.lse = log_sum_exp(a.lse, ragged ? 0 : a.lse.stride(0), a.lse.stride(-2), a.lse.stride(-1));
  }
}

}  // namespace

ElementType element_type(DLDataType dtype) {
  if (dtype == float16) return ElementType::float16;
  if (dtype == bfloat16) return ElementType::bfloat16;
  if (dtype == float8_e4m3fn) return ElementType::float8_e4m3;
  return ElementType::float32;
}

Problem make_problem(const AttentionArguments& a, const ArgumentNames& names) {
  check_given(names.q, a.q);
  check_given(names.k, a.k);
  check_given(names.v, a.v);
  check_places(a, names);
  check_types(a, names);

  Problem problem;
  set_options(problem, a);
  set_queries(problem, a, names);
  set_keys(problem, a, names);
  set_qv(problem, a);
  set_appended(problem, a, names);
  check_known_lengths(problem, names);
  set_rotary(problem, a, names);
  if (a.q.dtype() == float8_e4m3fn) problem.q_descale = descale_of("q_descale", a.q_descale, problem, a.q);
  if (a.k.dtype() == float8_e4m3fn) {
    problem.k_descale = descale_of("k_descale", a.k_descale, problem, a.q);
    problem.v_descale = descale_of("v_descale", a.v_descale, problem, a.q);
  }
  problem.sink = sink_of(a, problem.heads_q);
  problem.scheduler_metadata =
      int_vector("scheduler_metadata", a.scheduler_metadata, scheduler_metadata_size(problem.batch), "(b,)");
  const double scale =
      a.softmax_scale.value_or(1 / std::sqrt(problem.head_dim + (a.qv.given() ? problem.head_dim_v : 0.0)));
  check_finite("softmax_scale", scale);
  check_finite("softcap", a.softcap);
  problem.softmax_scale = static_cast<float>(scale);
  // A softcap that is too small for float32 caps as the smallest does.
  if (a.softcap > 0) problem.softcap = std::max(static_cast<float>(a.softcap), std::numeric_limits<float>::min());
  set_results(problem, a, names);
  return problem;
}

void allocate_out(Problem& problem, const AttentionArguments& a, const Allocate& allocate) {
  const bool ragged = problem.ragged_queries();
  const DLDataType dtype = a.q.dtype() == float8_e4m3fn ? bfloat16 : a.q.dtype();
  const Tensor out = allocate(dtype, a.q.device(), out_shape(problem).data() + ragged, 4 - ragged);
  check_place("out", out, "q", a.q);
  problem.out = rows_of(out);
}

Problem make_problem(const SchedulerMetadataArguments& a, const ArgumentNames& names) {
  Problem problem;
  set_options(problem, a);
  problem.batch = checked_length("batch_size", a.batch_size);
  problem.heads_q = checked_length("num_heads_q", a.num_heads_q);
  problem.heads_k = checked_length("num_heads_kv", a.num_heads_kv);
  require(a.num_heads_kv >= 1, "num_heads_kv must be at least 1, got ", a.num_heads_kv);
  require(a.num_heads_q % a.num_heads_kv == 0, "num_heads_q must be a multiple of num_heads_kv = ", a.num_heads_kv,
          ", got ", a.num_heads_q);
  check_head_dim("headdim", a.headdim);
  check_head_dim("headdim_v", a.headdim_v.value_or(a.headdim));
  problem.head_dim = static_cast<int>(a.headdim);
  problem.head_dim_v = static_cast<int>(a.headdim_v.value_or(a.headdim));
  require(!a.page_size || (*a.page_size >= 1 && *a.page_size <= max_length), "page_size must be at least 1, got ",
          a.page_size.value_or(0));
  const DLDataType kv_dtype = a.kv_dtype.value_or(a.qkv_dtype);
  check_type("qkv_dtype", a.qkv_dtype, query_types);
  check_type("kv_dtype", kv_dtype, key_types(a.qkv_dtype));
  problem.q.type = element_type(a.qkv_dtype);
  problem.k.type = problem.v.type = element_type(kv_dtype);
  // Marks of what a plan may ask about a call.
  problem.softcap = a.has_softcap ? 1.0F : 0.0F;
  if (a.has_qv) problem.qv.data = const_cast<int*>(&no_elements);

  require(a.seqused_k.given() || a.cu_seqlens_k.given(), names.seqused_k, " or cu_seqlens_k is required");
  const char* first_name = a.out.given() ? "out" : a.seqused_k.given() ? names.seqused_k : "cu_seqlens_k";
  const Tensor& first = a.out.given() ? a.out : a.seqused_k.given() ? a.seqused_k : a.cu_seqlens_k;
  for (const auto& [name, tensor] : {std::pair{names.seqused_k, &a.seqused_k},
                                     {"cu_seqlens_q", &a.cu_seqlens_q},
                                     {"cu_seqlens_k", &a.cu_seqlens_k},
                                     {"cu_seqlens_k_new", &a.cu_seqlens_k_new},
                                     {"seqused_q", &a.seqused_q},
                                     {"cache_leftpad", &a.cache_leftpad},
                                     {"out", &a.out}}) {
    check_place(name, *tensor, first_name, first);
  }
  check_dtype("out", a.out, {int32});
  check_shape("out", a.out, {scheduler_metadata_size(problem.batch)}, "(b,)");
  check_writable("out", a.out);

  problem.queries.cu_seqlens = int_vector("cu_seqlens_q", a.cu_seqlens_q, problem.batch + 1, "(b + 1,)");
  problem.queries.seqused = int_vector("seqused_q", a.seqused_q, problem.batch, "(b,)");
  problem.queries.rows = problem.max_seqlen_q = checked_length("max_seqlen_q", a.max_seqlen_q);
  // The host does not know how many rows the ragged tensors and the cache have: their offsets and lengths say enough.
  if (a.cu_seqlens_q.given()) problem.queries.rows = max_length;
  problem.max_seqlen_k = checked_length("max_seqlen_k", a.max_seqlen_k);
  KeyLayout& keys = problem.keys;
  keys.rows = max_length;
  keys.slots = problem.batch;
  keys.seqused = int_vector(names.seqused_k, a.seqused_k, problem.batch, "(b,)");
  keys.cu_seqlens = int_vector("cu_seqlens_k", a.cu_seqlens_k, problem.batch + 1, "(b + 1,)");
  keys.leftpad = int_vector("cache_leftpad", a.cache_leftpad, problem.batch, "(b,)");
  keys.new_rows = checked_length("max_seqlen_k_new", a.max_seqlen_k_new);
  keys.cu_seqlens_new = int_vector("cu_seqlens_k_new", a.cu_seqlens_k_new, problem.batch + 1, "(b + 1,)");
  if (keys.cu_seqlens_new.given()) keys.new_rows = max_length;
  keys.appends = keys.new_rows > 0;
  // Whether the keys of a cache that grows include the new ones is the caller's to say.
  if (keys.appends) problem.max_seqlen_k = max_length;
  if (problem.mask.cp_world > 1) {
    check_place("cp_tot_seqused_k", a.cp_tot_seqused_k, first_name, first);
    keys.cp_total = int_vector("cp_tot_seqused_k", a.cp_tot_seqused_k, problem.batch, "(b,)");
  }
  return problem;
}

CombineProblem make_problem(const CombineArguments& a) {
  check_given("out_partial", a.out_partial);
  check_given("lse_partial", a.lse_partial);
  check_given("out", a.out);
  for (const auto& [name, tensor] :
       {std::pair{"out_partial", &a.out_partial}, {"lse_partial", &a.lse_partial}, {"out", &a.out}, {"lse", &a.lse}}) {
    check_place(name, *tensor, "out_partial", a.out_partial);
  }
  check_dtype("out_partial", a.out_partial, {float32});
  check_dtype("lse_partial", a.lse_partial, {float32});
  check_dtype("out", a.out, {float32, float16, bfloat16});
  check_dtype("lse", a.lse, {float32});
  check_ndim("out_partial", a.out_partial, 5, "(splits, b, s, h, dv)");
  check_extents("out_partial", a.out_partial);
  check_shape("lse_partial", a.lse_partial, a.out_partial.shape(), 4, "(splits, b, s, h)");
  check_shape("out", a.out, a.out_partial.shape() + 1, 4, "(b, s, h, dv)");
  check_shape("lse", a.lse, a.out_partial.shape() + 1, 3, "(b, s, h)");
  check_contiguous_rows("out_partial", a.out_partial);
  check_contiguous_rows("out", a.out);
  check_writable("out", a.out);
  check_writable("lse", a.lse);
  check_disjoint("lse", a.lse, "out", a.out);
  check_disjoint("out", a.out, "out_partial", a.out_partial);
  check_disjoint("out", a.out, "lse_partial", a.lse_partial);

  CombineProblem problem;
  problem.splits = static_cast<int>(a.out_partial.size(0));
  problem.batch = static_cast<int>(a.out_partial.size(1));
  problem.rows = static_cast<int>(a.out_partial.size(2));
  problem.heads = static_cast<int>(a.out_partial.size(3));
  problem.head_dim_v = static_cast<int>(a.out_partial.size(4));
  problem.partial = {memory_of(a.out_partial), ElementType::float32, a.out_partial.stride(1), a.out_partial.stride(2),
                     a.out_partial.stride(3)};
  problem.partial_split_stride = a.out_partial.stride(0);
  problem.partial_lse =
      log_sum_exp(a.lse_partial, a.lse_partial.stride(1), a.lse_partial.stride(3), a.lse_partial.stride(2));
  problem.lse_split_stride = a.lse_partial.stride(0);
  problem.out = rows_of(a.out);
  if (a.lse.given()) problem.lse = log_sum_exp(a.lse, a.lse.stride(0), a.lse.stride(2), a.lse.stride(1));
  return problem;
}

}  // namespace mate
