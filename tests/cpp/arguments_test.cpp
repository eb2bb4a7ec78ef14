// The checks of arguments: each rule of the contract broken by itself, the error's kind, the argument that its message
// names, and that nothing was written; and the defaults that are filled in.
#include "attention/arguments.h"

#include <gtest/gtest.h>
#include <mate/attention.h>

#include <cctype>
#include <climits>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <functional>
#include <limits>
#include <set>
#include <string>
#include <vector>

#include "attention/check.h"
#include "attention/contents.h"
#include "memory.h"
#include "random.h"
#include "reference.h"

namespace mate {
namespace {

using namespace testing;

constexpr DLDataType int64{kDLInt, 64, 1};
constexpr DLDataType float64{kDLFloat, 64, 1};
constexpr DLDevice cuda{kDLCUDA, 0};
constexpr double nan = std::numeric_limits<double>::quiet_NaN();
constexpr double infinity = std::numeric_limits<double>::infinity();

Tensor on(const Tensor& tensor, DLDevice device) {
  std::vector<std::int64_t> shape(tensor.shape(), tensor.shape() + tensor.ndim());
  return Tensor(tensor.data(), tensor.dtype(), shape.data(), tensor.ndim(), device);
}

/// Another tensor of that shape.
Tensor of_type(Memory& memory, const Tensor& tensor, DLDataType dtype) {
  return memory.tensor(dtype, {tensor.shape(), tensor.shape() + tensor.ndim()});
}

/// Another tensor, of another extent of one dimension.
Tensor resized(Memory& memory, const Tensor& tensor, int dimension, std::int64_t extent) {
  std::vector<std::int64_t> shape(tensor.shape(), tensor.shape() + tensor.ndim());
  shape[dimension < 0 ? dimension + tensor.ndim() : dimension] = extent;
  const Tensor result = memory.tensor(tensor.dtype(), shape);
  fill(result, [] { return 1.0; });
  return result;
}

/// Another tensor, whose last dimension is not contiguous.
Tensor spread(Memory& memory, const Tensor& tensor) {
  std::vector<std::int64_t> strides(tensor.ndim(), 0);
  std::int64_t stride = 2;
  for (int i = tensor.ndim() - 1; i >= 0; --i) {
    strides[i] = stride;
    stride *= tensor.size(i);
  }
  return memory.tensor(tensor.dtype(), {tensor.shape(), tensor.shape() + tensor.ndim()}, strides);
}

/// A view of more elements than there are, for what must be refused before it is read.
Tensor huge(const Tensor& tensor, int dimension, std::int64_t extent) {
  std::vector<std::int64_t> shape(tensor.shape(), tensor.shape() + tensor.ndim());
  std::vector<std::int64_t> strides(tensor.ndim(), 0);
  shape[dimension] = extent;
  strides.back() = 1;
  return view(tensor, tensor.data(), shape, strides);
}

/// Calls without fault, one for each way in which queries and keys are stored.
enum class Base { normal, ragged, cache, paged, float8, ranks };

constexpr std::int64_t batch = 2, heads_q = 4, heads_k = 2, head_dim = 32, head_dim_v = 24;

AttentionArguments make_call(Memory& memory, Base base) {
  Random random(0);
  const auto tensor = [&](DLDataType dtype, const std::vector<std::int64_t>& shape) {
    const Tensor result = memory.tensor(dtype, shape);
    fill(result, [&] { return random.normal(); });
    return result;
  };
  const DLDataType dtype = base == Base::float8 ? float8_e4m3fn : bfloat16;
  AttentionArguments a;
  if (base == Base::ragged) {
    a.q = tensor(dtype, {7, heads_q, head_dim});
    a.qv = tensor(dtype, {7, heads_q, head_dim_v});
    a.out = memory.tensor(bfloat16, {7, heads_q, head_dim_v});
    a.lse = memory.tensor(float32, {heads_q, 7});
    a.cu_seqlens_q = memory.integers({0, 3, 7});
    a.max_seqlen_q = 4;
    a.k = tensor(dtype, {11, heads_k, head_dim});
    a.v = tensor(dtype, {11, heads_k, head_dim_v});
    a.cu_seqlens_k = memory.integers({0, 5, 11});
    a.max_seqlen_k = 6;
    a.seqused_q = memory.integers({3, 2});
    a.seqused_k = memory.integers({5, 4});
    return a;
  }
  a.q = tensor(dtype, {batch, 3, heads_q, head_dim});
  a.qv = tensor(dtype, {batch, 3, heads_q, head_dim_v});
  a.out = memory.tensor(bfloat16, {batch, 3, heads_q, head_dim_v});
  a.lse = memory.tensor(float32, {batch, heads_q, 3});
  a.seqused_q = memory.integers({3, 1});
  a.seqused_k = memory.integers({5, 4});
  a.learnable_sink = tensor(float32, {heads_q});
  a.scheduler_metadata = memory.integers(std::vector<std::int64_t>(scheduler_metadata_size(batch), 1));
  if (base == Base::normal || base == Base::float8 || base == Base::ranks) {
    a.k = tensor(dtype, {batch, 6, heads_k, head_dim});
    a.v = tensor(dtype, {batch, 6, heads_k, head_dim_v});
  }
  if (base == Base::float8) {
    a.q_descale = tensor(float32, {batch, heads_k});
    a.k_descale = tensor(float32, {batch, heads_k});
    a.v_descale = tensor(float32, {batch, heads_k});
  }
  if (base == Base::ranks) {
    a.cp_world_size = 2;
    a.cp_rank = 1;
    a.cp_tot_seqused_k = memory.integers({10, 9});
  }
  if (base == Base::cache || base == Base::paged) {
    a.causal = true;
    a.cache_batch_idx = memory.integers({2, 0});
    a.cache_leftpad = memory.integers({0, 1});
    a.rotary_cos = tensor(float32, {20, 8});
    a.rotary_sin = tensor(float32, {20, 8});
    a.rotary_seqlens = memory.integers({5, 4});
  }
  if (base == Base::cache) {
    a.k = tensor(dtype, {3, 8, heads_k, head_dim});
    a.v = tensor(dtype, {3, 8, heads_k, head_dim_v});
    a.k_new = tensor(dtype, {batch, 2, heads_k, head_dim});
    a.v_new = tensor(dtype, {batch, 2, heads_k, head_dim_v});
  }
  if (base == Base::paged) {
    a.k = tensor(dtype, {6, 4, heads_k, head_dim});
    a.v = tensor(dtype, {6, 4, heads_k, head_dim_v});
    a.page_table = memory.tensor(int32, {3, 2});
    const int pages[] = {3, 5, -1, -1, 4, 0};
    for (int i = 0; i < 6; ++i) write(a.page_table, pages[i], i / 2, i % 2);
    a.k_new = tensor(dtype, {5, heads_k, head_dim});
    a.v_new = tensor(dtype, {5, heads_k, head_dim_v});
    a.cu_seqlens_k_new = memory.integers({0, 3, 5});
  }
  return a;
}

template <typename Arguments>
struct Wrong {
  Base base;
  ErrorKind kind;
  std::string name;      ///< the argument with which the message begins
  std::string mentions;  ///< what else it says
  std::function<void(Memory&, Arguments&)> change;
};

template <typename Arguments>
using WrongList = std::vector<Wrong<Arguments>>;

constexpr ErrorKind type = ErrorKind::type;
constexpr ErrorKind value = ErrorKind::value;

void expect_error(ErrorKind kind, const std::string& name, const std::string& mentions,
                  const std::function<void()>& call) {
  try {
    call();
    ADD_FAILURE() << "a wrong " << name << " was taken: " << mentions;
  } catch (const Error& error) {
    const std::string message = error.what();
    EXPECT_EQ(static_cast<int>(error.kind()), static_cast<int>(kind)) << message;
    const bool begins = message.rfind(name, 0) == 0 && message.size() > name.size() &&
                        std::isalnum(static_cast<unsigned char>(message[name.size()])) == 0 &&
                        message[name.size()] != '_';
    EXPECT_TRUE(begins) << "does not begin with " << name << ": " << message;
    EXPECT_NE(message.find(mentions), std::string::npos) << "does not mention " << mentions << ": " << message;
  }
}

void expect_errors(const WrongList<AttentionArguments>& list) {
  for (const Wrong<AttentionArguments>& wrong : list) {
    SCOPED_TRACE(wrong.name + ", " + wrong.mentions);
    Memory memory;
    AttentionArguments a = make_call(memory, wrong.base);
    wrong.change(memory, a);
    memory.remember();
    expect_error(wrong.kind, wrong.name, wrong.mentions, [&] { attention(a); });
    EXPECT_TRUE(memory.unchanged());
  }
}

using Change = std::function<void(Memory&, AttentionArguments&)>;
using Member = Tensor AttentionArguments::*;

TEST(Arguments, WithoutFaultAreTaken) {
  for (const Base base : {Base::normal, Base::ragged, Base::cache, Base::paged, Base::float8, Base::ranks}) {
    Memory memory;
    const AttentionArguments a = make_call(memory, base);
    EXPECT_EQ(judge(memory, a), "") << static_cast<int>(base);
  }
}

TEST(Arguments, ThatAreRequired) {
  WrongList<AttentionArguments> list;
  const auto missing = [&](Base base, const char* name, const char* mentions, Member member) {
    list.push_back({base, value, name, mentions, [member](Memory&, AttentionArguments& a) { a.*member = Tensor(); }});
  };
  missing(Base::normal, "q", "required", &AttentionArguments::q);
  missing(Base::normal, "k", "required", &AttentionArguments::k);
  missing(Base::normal, "v", "required", &AttentionArguments::v);
  missing(Base::normal, "out", "required", &AttentionArguments::out);
  missing(Base::cache, "v_new", "k_new", &AttentionArguments::k_new);
  missing(Base::cache, "k_new", "v_new", &AttentionArguments::v_new);
  missing(Base::cache, "k_new", "seqused_k", &AttentionArguments::seqused_k);
  missing(Base::cache, "rotary_cos", "rotary_sin", &AttentionArguments::rotary_sin);
  missing(Base::cache, "rotary_sin", "rotary_cos", &AttentionArguments::rotary_cos);
  missing(Base::ranks, "cp_world_size", "cp_tot_seqused_k", &AttentionArguments::cp_tot_seqused_k);
  list.push_back({Base::cache, value, "rotary_cos", "k_new",
                  [](Memory&, AttentionArguments& a) { a.k_new = a.v_new = Tensor(); }});
  list.push_back({Base::ragged, value, "max_seqlen_q", "cu_seqlens_q",
                  [](Memory&, AttentionArguments& a) { a.max_seqlen_q.reset(); }});
  list.push_back({Base::ragged, value, "max_seqlen_k", "cu_seqlens_k",
                  [](Memory&, AttentionArguments& a) { a.max_seqlen_k.reset(); }});
  expect_errors(list);
}

TEST(Arguments, OfAWrongType) {
  WrongList<AttentionArguments> list;
  const auto wrong = [&](Base base, const char* name, Member member, DLDataType dtype, const char* got) {
    list.push_back(
        {base, type, name, std::string("got ") + got,
         [member, dtype](Memory& memory, AttentionArguments& a) { a.*member = of_type(memory, a.*member, dtype); }});
  };
  wrong(Base::normal, "q", &AttentionArguments::q, float64, "float64");
  wrong(Base::normal, "q", &AttentionArguments::q, int32, "int32");
  wrong(Base::normal, "k", &AttentionArguments::k, float16, "float16");
  wrong(Base::normal, "k", &AttentionArguments::k, float32, "float32");
  wrong(Base::normal, "v", &AttentionArguments::v, float16, "float16");
  wrong(Base::normal, "v", &AttentionArguments::v, float8_e4m3fn, "float8_e4m3fn");
  wrong(Base::normal, "qv", &AttentionArguments::qv, float16, "float16");
  wrong(Base::normal, "out", &AttentionArguments::out, float32, "float32");
  wrong(Base::normal, "lse", &AttentionArguments::lse, bfloat16, "bfloat16");
  wrong(Base::normal, "learnable_sink", &AttentionArguments::learnable_sink, int32, "int32");
  wrong(Base::normal, "learnable_sink", &AttentionArguments::learnable_sink, float64, "float64");
  wrong(Base::float8, "k", &AttentionArguments::k, bfloat16, "bfloat16");
  wrong(Base::float8, "out", &AttentionArguments::out, float32, "float32");
  wrong(Base::float8, "out", &AttentionArguments::out, float8_e4m3fn, "float8_e4m3fn");
  wrong(Base::float8, "q_descale", &AttentionArguments::q_descale, bfloat16, "bfloat16");
  wrong(Base::float8, "k_descale", &AttentionArguments::k_descale, float64, "float64");
  wrong(Base::float8, "v_descale", &AttentionArguments::v_descale, float16, "float16");
  wrong(Base::cache, "k_new", &AttentionArguments::k_new, float16, "float16");
  wrong(Base::cache, "k_new", &AttentionArguments::k_new, float8_e4m3fn, "float8_e4m3fn");
  list.push_back({Base::cache, ErrorKind::type, "v_new", "bfloat16", [](Memory& memory, AttentionArguments& a) {
                    for (Tensor* tensor : {&a.k, &a.v, &a.v_new}) *tensor = of_type(memory, *tensor, float8_e4m3fn);
                  }});
  wrong(Base::cache, "v_new", &AttentionArguments::v_new, float32, "float32");
  wrong(Base::cache, "rotary_cos", &AttentionArguments::rotary_cos, int32, "int32");
  wrong(Base::cache, "rotary_cos", &AttentionArguments::rotary_cos, float8_e4m3fn, "float8_e4m3fn");
  wrong(Base::cache, "rotary_sin", &AttentionArguments::rotary_sin, bfloat16, "bfloat16");
  const auto not_int32 = [&](Base base, const char* name, Member member) {
    wrong(base, name, member, int64, "int64");
    list.back().mentions = "must be int32, got int64";
    wrong(base, name, member, float32, "float32");
  };
  not_int32(Base::ragged, "cu_seqlens_q", &AttentionArguments::cu_seqlens_q);
  not_int32(Base::ragged, "cu_seqlens_k", &AttentionArguments::cu_seqlens_k);
  not_int32(Base::ragged, "seqused_q", &AttentionArguments::seqused_q);
  not_int32(Base::ragged, "seqused_k", &AttentionArguments::seqused_k);
  not_int32(Base::paged, "page_table", &AttentionArguments::page_table);
  not_int32(Base::paged, "cache_batch_idx", &AttentionArguments::cache_batch_idx);
  not_int32(Base::paged, "cache_leftpad", &AttentionArguments::cache_leftpad);
  not_int32(Base::paged, "cu_seqlens_k_new", &AttentionArguments::cu_seqlens_k_new);
  not_int32(Base::paged, "rotary_seqlens", &AttentionArguments::rotary_seqlens);
  not_int32(Base::normal, "scheduler_metadata", &AttentionArguments::scheduler_metadata);
  not_int32(Base::ranks, "cp_tot_seqused_k", &AttentionArguments::cp_tot_seqused_k);
  // New keys of an e4m3 cache come in the queries' type, or as they are.
  list.push_back({Base::cache, type, "v_new", "got float16", [](Memory& memory, AttentionArguments& a) {
                    a.k = of_type(memory, a.k, float8_e4m3fn);
                    a.v = of_type(memory, a.v, float8_e4m3fn);
                    a.v_new = of_type(memory, a.v_new, float16);
                  }});
  expect_errors(list);
}

TEST(Arguments, OnAnotherDevice) {
  WrongList<AttentionArguments> list;
  const auto elsewhere = [&](Base base, const char* name, Member member) {
    list.push_back(
        {base, value, name, "cuda:0", [member](Memory&, AttentionArguments& a) { a.*member = on(a.*member, cuda); }});
  };
  elsewhere(Base::normal, "k", &AttentionArguments::k);
  elsewhere(Base::normal, "v", &AttentionArguments::v);
  elsewhere(Base::normal, "qv", &AttentionArguments::qv);
  elsewhere(Base::normal, "out", &AttentionArguments::out);
  elsewhere(Base::normal, "lse", &AttentionArguments::lse);
  elsewhere(Base::normal, "learnable_sink", &AttentionArguments::learnable_sink);
  elsewhere(Base::normal, "scheduler_metadata", &AttentionArguments::scheduler_metadata);
  elsewhere(Base::ragged, "cu_seqlens_q", &AttentionArguments::cu_seqlens_q);
  elsewhere(Base::ragged, "cu_seqlens_k", &AttentionArguments::cu_seqlens_k);
  elsewhere(Base::ragged, "seqused_q", &AttentionArguments::seqused_q);
  elsewhere(Base::ragged, "seqused_k", &AttentionArguments::seqused_k);
  elsewhere(Base::paged, "page_table", &AttentionArguments::page_table);
  elsewhere(Base::paged, "cache_batch_idx", &AttentionArguments::cache_batch_idx);
  elsewhere(Base::paged, "cache_leftpad", &AttentionArguments::cache_leftpad);
  elsewhere(Base::paged, "k_new", &AttentionArguments::k_new);
  elsewhere(Base::paged, "v_new", &AttentionArguments::v_new);
  elsewhere(Base::paged, "cu_seqlens_k_new", &AttentionArguments::cu_seqlens_k_new);
  elsewhere(Base::paged, "rotary_cos", &AttentionArguments::rotary_cos);
  elsewhere(Base::paged, "rotary_sin", &AttentionArguments::rotary_sin);
  elsewhere(Base::paged, "rotary_seqlens", &AttentionArguments::rotary_seqlens);
  elsewhere(Base::float8, "q_descale", &AttentionArguments::q_descale);
  elsewhere(Base::float8, "k_descale", &AttentionArguments::k_descale);
  elsewhere(Base::float8, "v_descale", &AttentionArguments::v_descale);
  elsewhere(Base::ranks, "cp_tot_seqused_k", &AttentionArguments::cp_tot_seqused_k);
  expect_errors(list);
}

TEST(Arguments, OnADeviceWithoutABackend) {
  Memory memory;
  const std::pair<DLDevice, const char*> devices[] = {
      {{kDLCUDA, 1}, "cuda:1"}, {{kDLMetal, 0}, "mps:0"}, {{kDLROCM, 2}, "rocm:2"}};
  for (const auto& [device, name] : devices) {
    AttentionArguments a = make_call(memory, Base::normal);
    for (const Member member : {&AttentionArguments::q, &AttentionArguments::k, &AttentionArguments::v,
                                &AttentionArguments::qv, &AttentionArguments::out, &AttentionArguments::lse,
                                &AttentionArguments::seqused_q, &AttentionArguments::seqused_k,
                                &AttentionArguments::learnable_sink, &AttentionArguments::scheduler_metadata}) {
      a.*member = on(a.*member, device);
    }
    try {
      attention(a);
      ADD_FAILURE() << "a call was served that has no backend";
    } catch (const Error& error) {
      EXPECT_EQ(static_cast<int>(error.kind()), static_cast<int>(ErrorKind::not_implemented)) << error.what();
      EXPECT_NE(std::string(error.what()).find(name), std::string::npos) << error.what();
    }
  }
}

TEST(Arguments, OfAWrongShape) {
  WrongList<AttentionArguments> list;
  const auto extent = [&](Base base, const char* name, Member member, int dimension, std::int64_t size) {
    list.push_back({base, value, name, "got", [member, dimension, size](Memory& memory, AttentionArguments& a) {
                      a.*member = resized(memory, a.*member, dimension, size);
                    }});
  };
  const auto shape = [&](Base base, const char* name, Member member, const std::vector<std::int64_t>& sizes) {
    list.push_back({base, value, name, "got", [member, sizes](Memory& memory, AttentionArguments& a) {
                      a.*member = memory.tensor((a.*member).dtype(), sizes);
                    }});
  };
  // Queries.
  shape(Base::normal, "q", &AttentionArguments::q, {7, heads_q, head_dim});
  shape(Base::normal, "q", &AttentionArguments::q, {});
  shape(Base::normal, "q", &AttentionArguments::q, {1, batch, 3, heads_q, head_dim});
  shape(Base::ragged, "q", &AttentionArguments::q, {1, 7, heads_q, head_dim});
  extent(Base::normal, "q", &AttentionArguments::q, 3, 0);
  extent(Base::normal, "q", &AttentionArguments::q, 3, 513);
  extent(Base::normal, "q", &AttentionArguments::q, 2, 3);
  list.back().mentions = "multiple";
  extent(Base::normal, "qv", &AttentionArguments::qv, 3, head_dim_v + 1);
  extent(Base::normal, "qv", &AttentionArguments::qv, 1, 2);
  extent(Base::normal, "qv", &AttentionArguments::qv, 2, heads_k);
  shape(Base::normal, "qv", &AttentionArguments::qv, {batch, 3, heads_q * head_dim_v});
  shape(Base::ragged, "cu_seqlens_q", &AttentionArguments::cu_seqlens_q, {3, 1});
  shape(Base::ragged, "cu_seqlens_q", &AttentionArguments::cu_seqlens_q, {0});
  extent(Base::normal, "seqused_q", &AttentionArguments::seqused_q, 0, batch + 1);
  shape(Base::normal, "seqused_q", &AttentionArguments::seqused_q, {batch, 1});
  // Keys and values.
  shape(Base::normal, "k", &AttentionArguments::k, {11, heads_k, head_dim});
  shape(Base::ragged, "k", &AttentionArguments::k, {1, 11, heads_k, head_dim});
  shape(Base::paged, "k", &AttentionArguments::k, {24, heads_k, head_dim});
  extent(Base::normal, "k", &AttentionArguments::k, 0, batch + 1);
  extent(Base::normal, "k", &AttentionArguments::k, 2, 0);
  extent(Base::normal, "k", &AttentionArguments::k, 3, head_dim + 1);
  extent(Base::paged, "k", &AttentionArguments::k, 1, 0);
  extent(Base::normal, "v", &AttentionArguments::v, 0, batch + 1);
  extent(Base::normal, "v", &AttentionArguments::v, 1, 5);
  extent(Base::normal, "v", &AttentionArguments::v, 2, 1);
  extent(Base::normal, "v", &AttentionArguments::v, 3, 0);
  extent(Base::normal, "v", &AttentionArguments::v, 3, 513);
  shape(Base::normal, "v", &AttentionArguments::v, {batch, 6, heads_k * head_dim_v});
  extent(Base::ragged, "cu_seqlens_k", &AttentionArguments::cu_seqlens_k, 0, batch);
  extent(Base::normal, "seqused_k", &AttentionArguments::seqused_k, 0, batch - 1);
  // The cache.
  shape(Base::paged, "page_table", &AttentionArguments::page_table, {6});
  shape(Base::paged, "page_table", &AttentionArguments::page_table, {3, 2, 1});
  extent(Base::cache, "cache_batch_idx", &AttentionArguments::cache_batch_idx, 0, 3);
  extent(Base::cache, "cache_leftpad", &AttentionArguments::cache_leftpad, 0, 3);
  list.push_back({Base::paged, value, "page_table", "got", [](Memory&, AttentionArguments& a) {
                    a.cache_batch_idx = Tensor();  // the table has 3 rows, and the batch 2
                  }});
  list.push_back(
      {Base::cache, value, "k", "got", [](Memory&, AttentionArguments& a) { a.cache_batch_idx = Tensor(); }});
  // New keys and their rotation.
  extent(Base::cache, "k_new", &AttentionArguments::k_new, 0, 1);
  extent(Base::cache, "k_new", &AttentionArguments::k_new, 2, 1);
  extent(Base::cache, "k_new", &AttentionArguments::k_new, 3, head_dim - 1);
  extent(Base::cache, "v_new", &AttentionArguments::v_new, 1, 1);
  extent(Base::cache, "v_new", &AttentionArguments::v_new, 3, head_dim);
  shape(Base::cache, "k_new", &AttentionArguments::k_new, {4, heads_k, head_dim});
  shape(Base::paged, "k_new", &AttentionArguments::k_new, {1, 5, heads_k, head_dim});
  extent(Base::paged, "v_new", &AttentionArguments::v_new, 0, 4);
  extent(Base::paged, "cu_seqlens_k_new", &AttentionArguments::cu_seqlens_k_new, 0, batch);
  extent(Base::cache, "rotary_sin", &AttentionArguments::rotary_sin, 0, 19);
  extent(Base::cache, "rotary_sin", &AttentionArguments::rotary_sin, 1, 16);
  shape(Base::cache, "rotary_cos", &AttentionArguments::rotary_cos, {20, 8, 1});
  extent(Base::cache, "rotary_seqlens", &AttentionArguments::rotary_seqlens, 0, 1);
  for (const std::int64_t half : {0, 4, 12, 24}) {  // no dimension, no multiple of 16 (twice), more than d
    list.push_back({Base::cache, value, "rotary_cos", "16", [half](Memory& memory, AttentionArguments& a) {
                      a.rotary_cos = a.rotary_sin = memory.tensor(float32, {20, half});
                    }});
  }
  list.push_back({Base::cache, value, "rotary_cos", "got", [](Memory& memory, AttentionArguments& a) {
                    a.rotary_cos = a.rotary_sin = memory.tensor(float32, {0, 8});
                  }});
  // Scores, work and results.
  extent(Base::normal, "learnable_sink", &AttentionArguments::learnable_sink, 0, heads_k);
  shape(Base::normal, "learnable_sink", &AttentionArguments::learnable_sink, {heads_q, 1});
  extent(Base::float8, "q_descale", &AttentionArguments::q_descale, 1, heads_q);
  extent(Base::float8, "k_descale", &AttentionArguments::k_descale, 0, 1);
  shape(Base::float8, "v_descale", &AttentionArguments::v_descale, {1});
  extent(Base::ranks, "cp_tot_seqused_k", &AttentionArguments::cp_tot_seqused_k, 0, 1);
  extent(Base::normal, "scheduler_metadata", &AttentionArguments::scheduler_metadata, 0, 1000);
  extent(Base::normal, "out", &AttentionArguments::out, 3, head_dim);
  extent(Base::normal, "out", &AttentionArguments::out, 1, 4);
  shape(Base::ragged, "out", &AttentionArguments::out, {1, 7, heads_q, head_dim_v});
  shape(Base::normal, "lse", &AttentionArguments::lse, {batch, 3, heads_q});
  shape(Base::ragged, "lse", &AttentionArguments::lse, {7, heads_q});
  expect_errors(list);
}

TEST(Arguments, WithALastDimensionThatIsNotContiguous) {
  WrongList<AttentionArguments> list;
  const auto spread_out = [&](Base base, const char* name, Member member) {
    list.push_back({base, value, name, "contiguous",
                    [member](Memory& memory, AttentionArguments& a) { a.*member = spread(memory, a.*member); }});
  };
  spread_out(Base::normal, "q", &AttentionArguments::q);
  spread_out(Base::normal, "k", &AttentionArguments::k);
  spread_out(Base::normal, "v", &AttentionArguments::v);
  spread_out(Base::normal, "qv", &AttentionArguments::qv);
  spread_out(Base::normal, "out", &AttentionArguments::out);
  spread_out(Base::paged, "page_table", &AttentionArguments::page_table);
  spread_out(Base::paged, "k_new", &AttentionArguments::k_new);
  spread_out(Base::cache, "v_new", &AttentionArguments::v_new);
  spread_out(Base::cache, "rotary_cos", &AttentionArguments::rotary_cos);
  spread_out(Base::cache, "rotary_sin", &AttentionArguments::rotary_sin);
  expect_errors(list);
}

TEST(Arguments, OfAWrongValueOrCombination) {
  WrongList<AttentionArguments> list;
  const auto wrong = [&](Base base, const char* name, const char* mentions, const Change& change) {
    list.push_back({base, value, name, mentions, change});
  };
  wrong(Base::normal, "softmax_scale", "finite", [](Memory&, AttentionArguments& a) { a.softmax_scale = nan; });
  wrong(Base::normal, "softmax_scale", "inf", [](Memory&, AttentionArguments& a) { a.softmax_scale = infinity; });
  wrong(Base::normal, "softmax_scale", "1e+39", [](Memory&, AttentionArguments& a) { a.softmax_scale = 1e39; });
  wrong(Base::normal, "softcap", "finite", [](Memory&, AttentionArguments& a) { a.softcap = nan; });
  wrong(Base::normal, "softcap", "inf", [](Memory&, AttentionArguments& a) { a.softcap = infinity; });
  wrong(Base::normal, "num_splits", "257", [](Memory&, AttentionArguments& a) { a.num_splits = 257; });
  wrong(Base::normal, "sm_margin", "-1", [](Memory&, AttentionArguments& a) { a.sm_margin = -1; });
  wrong(Base::normal, "max_seqlen_q", "-1", [](Memory&, AttentionArguments& a) { a.max_seqlen_q = -1; });
  wrong(Base::normal, "max_seqlen_k", "-2", [](Memory&, AttentionArguments& a) { a.max_seqlen_k = -2; });
  wrong(Base::normal, "cp_world_size", "0", [](Memory&, AttentionArguments& a) { a.cp_world_size = 0; });
  wrong(Base::normal, "cp_rank", "1", [](Memory&, AttentionArguments& a) { a.cp_rank = 1; });
  wrong(Base::ranks, "cp_rank", "2", [](Memory&, AttentionArguments& a) { a.cp_rank = 2; });
  wrong(Base::ranks, "cp_rank", "-1", [](Memory&, AttentionArguments& a) { a.cp_rank = -1; });
  wrong(Base::cache, "rotary_cos", "cp_world_size", [](Memory& memory, AttentionArguments& a) {
    a.cp_world_size = 2;
    a.cp_tot_seqused_k = memory.integers({20, 20});
  });
  wrong(Base::paged, "page_table", "cu_seqlens_k", [](Memory& memory, AttentionArguments& a) {
    a.cu_seqlens_k = memory.integers({0, 5, 9});
  });
  wrong(Base::ragged, "cache_batch_idx", "cu_seqlens_k", [](Memory& memory, AttentionArguments& a) {
    a.cache_batch_idx = memory.integers({0, 1});
  });
  wrong(Base::ragged, "cache_leftpad", "cu_seqlens_k", [](Memory& memory, AttentionArguments& a) {
    a.cache_leftpad = memory.integers({0, 0});
  });
  wrong(Base::ragged, "k_new", "cu_seqlens_k", [](Memory& memory, AttentionArguments& a) {
    a.k_new = memory.tensor(bfloat16, {batch, 1, heads_k, head_dim});
    a.v_new = memory.tensor(bfloat16, {batch, 1, heads_k, head_dim_v});
  });
  // Extents that 32 bits do not count.
  wrong(Base::normal, "q", "2**31", [](Memory&, AttentionArguments& a) { a.q = huge(a.q, 1, std::int64_t{1} << 31); });
  wrong(Base::cache, "k", "2**31", [](Memory&, AttentionArguments& a) { a.k = huge(a.k, 1, std::int64_t{1} << 31); });
  wrong(Base::paged, "page_table", "2**31",
        [](Memory&, AttentionArguments& a) { a.page_table = huge(a.page_table, 1, std::int64_t{1} << 31); });
  expect_errors(list);
}

TEST(Arguments, ThatHoldWrongLengths) {
  WrongList<AttentionArguments> list;
  const auto holds = [&](Base base, const char* name, const char* mentions, Member member, int index, int element) {
    list.push_back({base, value, name, mentions,
                    [member, index, element](Memory&, AttentionArguments& a) { write(a.*member, element, index); }});
  };
  holds(Base::ragged, "cu_seqlens_q", "-1", &AttentionArguments::cu_seqlens_q, 0, -1);
  holds(Base::ragged, "cu_seqlens_q", "8", &AttentionArguments::cu_seqlens_q, 1, 8);
  holds(Base::ragged, "cu_seqlens_q", "8", &AttentionArguments::cu_seqlens_q, 2, 8);
  holds(Base::ragged, "cu_seqlens_q", "decrease", &AttentionArguments::cu_seqlens_q, 1, INT_MIN);
  holds(Base::ragged, "cu_seqlens_k", "-1", &AttentionArguments::cu_seqlens_k, 0, -1);
  holds(Base::ragged, "cu_seqlens_k", "decrease", &AttentionArguments::cu_seqlens_k, 1, INT_MAX);
  holds(Base::ragged, "cu_seqlens_k", "12", &AttentionArguments::cu_seqlens_k, 2, 12);
  holds(Base::paged, "cu_seqlens_k_new", "-3", &AttentionArguments::cu_seqlens_k_new, 0, -3);
  holds(Base::paged, "cu_seqlens_k_new", "decrease", &AttentionArguments::cu_seqlens_k_new, 1, 6);
  holds(Base::paged, "cu_seqlens_k_new", "6", &AttentionArguments::cu_seqlens_k_new, 2, 6);
  holds(Base::normal, "seqused_q", "4", &AttentionArguments::seqused_q, 0, 4);
  holds(Base::normal, "seqused_q", "-1", &AttentionArguments::seqused_q, 1, -1);
  holds(Base::ragged, "seqused_q", "5", &AttentionArguments::seqused_q, 1, 5);
  holds(Base::normal, "seqused_k", "7", &AttentionArguments::seqused_k, 0, 7);
  holds(Base::normal, "seqused_k", "-1", &AttentionArguments::seqused_k, 1, -1);
  holds(Base::ragged, "seqused_k", "7", &AttentionArguments::seqused_k, 1, 7);
  holds(Base::paged, "seqused_k", "9", &AttentionArguments::seqused_k, 0, 9);
  holds(Base::cache, "cache_leftpad", "6", &AttentionArguments::cache_leftpad, 0, 6);
  holds(Base::cache, "cache_leftpad", "-1", &AttentionArguments::cache_leftpad, 1, -1);
  holds(Base::cache, "cache_batch_idx", "3", &AttentionArguments::cache_batch_idx, 0, 3);
  holds(Base::cache, "cache_batch_idx", "-1", &AttentionArguments::cache_batch_idx, 1, -1);
  holds(Base::paged, "cache_batch_idx", "3", &AttentionArguments::cache_batch_idx, 0, 3);
  holds(Base::paged, "cache_batch_idx", "-2147483648", &AttentionArguments::cache_batch_idx, 1, INT_MIN);
  holds(Base::ranks, "cp_tot_seqused_k", "-1", &AttentionArguments::cp_tot_seqused_k, 1, -1);
  const auto changed = [&](Base base, const char* name, const char* mentions, const Change& change) {
    list.push_back({base, value, name, mentions, change});
  };
  changed(Base::ragged, "max_seqlen_q", "3", [](Memory&, AttentionArguments& a) { a.max_seqlen_q = 2; });
  changed(Base::normal, "max_seqlen_q", "2", [](Memory&, AttentionArguments& a) { a.max_seqlen_q = 2; });
  changed(Base::ragged, "max_seqlen_k", "4", [](Memory&, AttentionArguments& a) { a.max_seqlen_k = 4; });
  // What is appended does not fit.
  holds(Base::cache, "k_new", "7", &AttentionArguments::seqused_k, 0, 7);
  holds(Base::paged, "k_new", "6", &AttentionArguments::seqused_k, 0, 6);
  // Two sequences append to one place.
  holds(Base::cache, "k_new", "twice", &AttentionArguments::cache_batch_idx, 1, 2);
  changed(Base::paged, "k_new", "twice", [](Memory&, AttentionArguments& a) { write(a.page_table, 0, 0, 1); });
  // Pages outside the cache, among those that hold the sequence.
  for (const int page : {-1, 6, INT_MAX, INT_MIN}) {
    changed(Base::paged, "page_table", "page",
            [page](Memory&, AttentionArguments& a) { write(a.page_table, page, 2, 0); });
    changed(Base::paged, "page_table", "page",
            [page](Memory&, AttentionArguments& a) { write(a.page_table, page, 0, 1); });
  }
  expect_errors(list);
}

TEST(Arguments, ThatMeanNothingAreIgnored) {
  Memory memory;
  AttentionArguments a = make_call(memory, Base::normal);
  // Scales of types that have none, the total of a single rank, and how what is not appended would lie.
  a.q_descale = a.k_descale = a.v_descale = Tensor(nullptr, int64, {3}, cuda);
  a.cp_tot_seqused_k = Tensor(nullptr, float32, {}, cuda);
  a.cu_seqlens_k_new = memory.tensor(int64, {9});
  a.rotary_seqlens = memory.integers({1000, -1000});
  a.softcap = -3;
  a.num_splits = -7;
  a.attention_chunk = -1;
  a.window_left = INT64_MIN;
  a.window_right = INT64_MIN;
  a.max_seqlen_q = 1000;
  EXPECT_EQ(judge(memory, a), "");

  AttentionArguments narrow = make_call(memory, Base::cache);
  narrow.k = of_type(memory, narrow.k, float8_e4m3fn);
  narrow.v = of_type(memory, narrow.v, float8_e4m3fn);
  fill(narrow.k, [] { return 0.5; });
  fill(narrow.v, [] { return 0.25; });
  narrow.q_descale = Tensor(nullptr, int64, {3}, cuda);
  EXPECT_EQ(judge(memory, narrow), "");
}

TEST(Arguments, RotaryPositionsPastTheTableAreAnErrorOnlyWhereChecksAreRequested) {
  Memory memory;
  const auto with_positions = [&](std::int64_t first, std::int64_t second) {
    AttentionArguments a = make_call(memory, Base::cache);
    a.rotary_seqlens = memory.integers({first, second});
    return a;
  };
  ASSERT_EQ(unsetenv("MATE_CHECK"), 0);
  EXPECT_NO_THROW(attention(with_positions(5, 1000)));
  EXPECT_NO_THROW(attention(with_positions(INT_MAX, 0)));
  EXPECT_NO_THROW(attention(with_positions(INT_MIN, 0)));
  ASSERT_EQ(setenv("MATE_CHECK", "1", 1), 0);
  EXPECT_NO_THROW(attention(with_positions(5, 17)));  // the last of 3 queries is at position 19 of 20
  AttentionArguments a = with_positions(18, 0);
  memory.remember();
  expect_error(value, "rotary_cos", "20", [&] { attention(a); });
  expect_error(value, "rotary_seqlens", "-1", [&] { attention(with_positions(3, -1)); });
  // Where nothing is rotated, no position is read.
  AttentionArguments idle = with_positions(1000, 0);
  idle.seqused_q = memory.integers({0, 3});
  idle.k_new = memory.tensor(bfloat16, {2, heads_k, head_dim});
  idle.v_new = memory.tensor(bfloat16, {2, heads_k, head_dim_v});
  fill(idle.k_new, [] { return 1.0; });
  fill(idle.v_new, [] { return 1.0; });
  idle.cu_seqlens_k_new = memory.integers({0, 0, 2});
  EXPECT_NO_THROW(attention(idle));
  ASSERT_EQ(unsetenv("MATE_CHECK"), 0);
}

TEST(Arguments, OfTheCacheCallsGoByTheirNamesThere) {
  const auto named = [](const char* name, const char* mentions, const Change& change) {
    Memory memory;
    AttentionArguments a = make_call(memory, Base::cache);
    change(memory, a);
    expect_error(value, name, mentions, [&] {
      attention(a, {"q", "k_cache", "v_cache", "k", "v", "cache_seqlens"}, {});
    });
  };
  named("k_cache", "required", [](Memory&, AttentionArguments& a) { a.k = Tensor(); });
  named("v_cache", "required", [](Memory&, AttentionArguments& a) { a.v = Tensor(); });
  named("k", "cache_seqlens", [](Memory&, AttentionArguments& a) { a.seqused_k = Tensor(); });
  named("k", "v, which is missing", [](Memory&, AttentionArguments& a) { a.v_new = Tensor(); });
  named("v", "k, which is missing", [](Memory&, AttentionArguments& a) { a.k_new = Tensor(); });
  named("cache_seqlens", "9", [](Memory&, AttentionArguments& a) { write(a.seqused_k, 9, 0); });
  named("k", "k_cache", [](Memory&, AttentionArguments& a) { write(a.cache_batch_idx, 2, 1); });
}

TEST(MakeProblem, FillsInTheDefaults) {
  Memory memory;
  AttentionArguments a = make_call(memory, Base::normal);
  a.qv = Tensor();
  Problem problem = make_problem(a, {});
  EXPECT_EQ(problem.batch, batch);
  EXPECT_EQ(problem.heads_q, heads_q);
  EXPECT_EQ(problem.heads_k, heads_k);
  EXPECT_EQ(problem.head_dim, head_dim);
  EXPECT_EQ(problem.head_dim_v, head_dim_v);
  EXPECT_EQ(problem.group(), 2);
  EXPECT_FLOAT_EQ(problem.softmax_scale, 1 / std::sqrt(32.0F));
  EXPECT_EQ(problem.softcap, 0);
  EXPECT_EQ(problem.num_splits, 0);
  EXPECT_EQ(problem.pack_gqa, -1);
  EXPECT_FALSE(problem.mask.bounded());
  EXPECT_FALSE(problem.qv.given());
  EXPECT_FALSE(problem.ragged_queries());
  EXPECT_FALSE(problem.keys.appends);
  EXPECT_FALSE(problem.rotary.given());

  a = make_call(memory, Base::normal);
  EXPECT_FLOAT_EQ(make_problem(a, {}).softmax_scale, 1 / std::sqrt(56.0F)) << "with qv";
  a.softmax_scale = 0;
  a.softcap = 2.5;
  a.pack_gqa = false;
  a.sm_margin = std::int64_t{1} << 40;
  problem = make_problem(a, {});
  EXPECT_EQ(problem.softmax_scale, 0);
  EXPECT_EQ(problem.softcap, 2.5F);
  EXPECT_EQ(problem.pack_gqa, 0);
  EXPECT_EQ(problem.sm_margin, INT_MAX);
}

TEST(MakeProblem, NormalisesMasks) {
  struct MaskCase {
    bool causal;
    std::int64_t left, right, chunk;
    int expected_left, expected_right, expected_chunk;
  };
  Memory memory;
  AttentionArguments a = make_call(memory, Base::cache);
  for (const MaskCase& c :
       {MaskCase{false, -1, -1, 0, -1, -1, 0}, MaskCase{true, -1, -1, 0, -1, 0, 0}, MaskCase{true, 3, 5, 0, 3, 0, 0},
        MaskCase{false, 3, 5, 7, 3, 5, 7}, MaskCase{false, -100, -7, -3, -1, -1, 0}, MaskCase{false, 0, 0, 1, 0, 0, 1},
        MaskCase{false, INT64_MAX, INT64_MAX, INT64_MAX, INT_MAX, INT_MAX, INT_MAX}}) {
    a.causal = c.causal;
    a.window_left = c.left;
    a.window_right = c.right;
    a.attention_chunk = c.chunk;
    const Problem problem = make_problem(a, {});
    EXPECT_EQ(problem.mask.left, c.expected_left);
    EXPECT_EQ(problem.mask.right, c.expected_right);
    EXPECT_EQ(problem.mask.chunk, c.expected_chunk);
    // Any mask argument makes the rotation advance with the query, even one that hides nothing.
    EXPECT_EQ(problem.rotary.queries_advance, c.causal || c.left >= 0 || c.right >= 0 || c.chunk > 0);
  }
}

TEST(MakeProblem, TellsTensorsWithoutElementsFromThoseNotGiven) {
  Memory memory;
  AttentionArguments a = make_call(memory, Base::cache);
  a.rotary_cos = a.rotary_sin = a.rotary_seqlens = Tensor();
  a.k_new = Tensor(nullptr, bfloat16, {batch, 0, heads_k, head_dim});
  a.v_new = Tensor(nullptr, bfloat16, {batch, 0, heads_k, head_dim_v});
  const Problem problem = make_problem(a, {});
  EXPECT_TRUE(problem.keys.appends);
  EXPECT_TRUE(problem.k_new.given());
  EXPECT_EQ(problem.keys.new_rows, 0);
}

/// The metadata of two sequences of 3 queries.
SchedulerMetadataArguments make_metadata_call(Memory& memory) {
  SchedulerMetadataArguments a;
  a.batch_size = batch;
  a.max_seqlen_q = 3;
  a.max_seqlen_k = 6;
  a.num_heads_q = heads_q;
  a.num_heads_kv = heads_k;
  a.headdim = head_dim;
  a.seqused_k = memory.integers({5, 4});
  a.out = memory.tensor(int32, {scheduler_metadata_size(batch)});
  return a;
}

TEST(SchedulerMetadataArguments, WithoutFaultAreTaken) {
  Memory memory;
  SchedulerMetadataArguments a = make_metadata_call(memory);
  scheduler_metadata(a);
  for_each_element(a.out, [&](const std::byte* at) { EXPECT_GE(read_at(a.out, at), 0); });
  a.seqused_k = Tensor();
  a.cu_seqlens_k = memory.integers({0, 5, 11});
  a.cu_seqlens_q = memory.integers({0, 3, 5});
  a.seqused_q = memory.integers({1, 2});
  a.page_size = 16;
  a.headdim_v = 512;
  a.qkv_dtype = float16;
  a.kv_dtype = float8_e4m3fn;
  scheduler_metadata(a);
}

TEST(SchedulerMetadataArguments, AreChecked) {
  using Arguments = SchedulerMetadataArguments;
  WrongList<Arguments> list;
  const auto wrong = [&](ErrorKind kind, const char* name, const char* mentions,
                         const std::function<void(Memory&, Arguments&)>& change) {
    list.push_back({{}, kind, name, mentions, change});
  };
  wrong(value, "batch_size", "-1", [](Memory&, Arguments& a) { a.batch_size = -1; });
  wrong(value, "max_seqlen_q", "-1", [](Memory&, Arguments& a) { a.max_seqlen_q = -1; });
  wrong(value, "max_seqlen_k", "-1", [](Memory&, Arguments& a) { a.max_seqlen_k = -1; });
  wrong(value, "max_seqlen_k_new", "-1", [](Memory&, Arguments& a) { a.max_seqlen_k_new = -1; });
  wrong(value, "num_heads_q", "-4", [](Memory&, Arguments& a) { a.num_heads_q = -4; });
  wrong(value, "num_heads_q", "3", [](Memory&, Arguments& a) { a.num_heads_q = 3; });
  wrong(value, "num_heads_kv", "0", [](Memory&, Arguments& a) { a.num_heads_kv = 0; });
  wrong(value, "headdim", "0", [](Memory&, Arguments& a) { a.headdim = 0; });
  wrong(value, "headdim", "513", [](Memory&, Arguments& a) { a.headdim = 513; });
  wrong(value, "headdim_v", "513", [](Memory&, Arguments& a) { a.headdim_v = 513; });
  wrong(value, "page_size", "0", [](Memory&, Arguments& a) { a.page_size = 0; });
  wrong(value, "num_splits", "257", [](Memory&, Arguments& a) { a.num_splits = 257; });
  wrong(value, "sm_margin", "-1", [](Memory&, Arguments& a) { a.sm_margin = -1; });
  wrong(value, "cp_rank", "2", [](Memory&, Arguments& a) { a.cp_rank = 2; });
  wrong(value, "cp_world_size", "cp_tot_seqused_k", [](Memory&, Arguments& a) { a.cp_world_size = 2; });
  wrong(type, "qkv_dtype", "got int32", [](Memory&, Arguments& a) { a.qkv_dtype = int32; });
  wrong(type, "kv_dtype", "got float64", [](Memory&, Arguments& a) { a.kv_dtype = float64; });
  wrong(value, "seqused_k", "cu_seqlens_k", [](Memory&, Arguments& a) { a.seqused_k = Tensor(); });
  wrong(type, "seqused_k", "must be int32, got int64",
        [](Memory& memory, Arguments& a) { a.seqused_k = memory.tensor(int64, {batch}); });
  wrong(value, "seqused_k", "got", [](Memory& memory, Arguments& a) { a.seqused_k = memory.integers({1, 2, 3}); });
  wrong(value, "seqused_k", "-1", [](Memory& memory, Arguments& a) { a.seqused_k = memory.integers({5, -1}); });
  wrong(value, "seqused_k", "cuda:0", [](Memory&, Arguments& a) { a.seqused_k = on(a.seqused_k, cuda); });
  wrong(value, "cu_seqlens_q", "got", [](Memory& memory, Arguments& a) { a.cu_seqlens_q = memory.integers({0, 3}); });
  wrong(value, "cu_seqlens_q", "decrease", [](Memory& memory, Arguments& a) {
    a.cu_seqlens_q = memory.integers({0, 3, 2});
  });
  wrong(value, "cu_seqlens_k", "got", [](Memory& memory, Arguments& a) { a.cu_seqlens_k = memory.integers({0, 3}); });
  wrong(value, "cu_seqlens_k_new", "decrease", [](Memory& memory, Arguments& a) {
    a.cu_seqlens_k_new = memory.integers({0, 3, 2});
  });
  wrong(value, "seqused_q", "4", [](Memory& memory, Arguments& a) { a.seqused_q = memory.integers({3, 4}); });
  wrong(value, "cache_leftpad", "6", [](Memory& memory, Arguments& a) { a.cache_leftpad = memory.integers({6, 0}); });
  wrong(value, "max_seqlen_q", "4", [](Memory& memory, Arguments& a) { a.cu_seqlens_q = memory.integers({0, 4, 4}); });
  wrong(value, "max_seqlen_k", "7", [](Memory& memory, Arguments& a) { a.seqused_k = memory.integers({7, 0}); });
  wrong(value, "out", "required", [](Memory&, Arguments& a) { a.out = Tensor(); });
  wrong(type, "out", "must be int32, got float32",
        [](Memory& memory, Arguments& a) { a.out = of_type(memory, a.out, float32); });
  wrong(value, "out", "got",
        [](Memory& memory, Arguments& a) { a.out = memory.tensor(int32, {scheduler_metadata_size(batch) + 1}); });
  for (const Wrong<Arguments>& item : list) {
    SCOPED_TRACE(item.name + ", " + item.mentions);
    Memory memory;
    Arguments a = make_metadata_call(memory);
    item.change(memory, a);
    memory.remember();
    expect_error(item.kind, item.name, item.mentions, [&] { scheduler_metadata(a); });
    EXPECT_TRUE(memory.unchanged());
  }
}

TEST(CombineArguments, AreChecked) {
  using Arguments = CombineArguments;
  WrongList<Arguments> list;
  const auto wrong = [&](ErrorKind kind, const char* name, const char* mentions,
                         const std::function<void(Memory&, Arguments&)>& change) {
    list.push_back({{}, kind, name, mentions, change});
  };
  wrong(value, "out_partial", "required", [](Memory&, Arguments& a) { a.out_partial = Tensor(); });
  wrong(value, "lse_partial", "required", [](Memory&, Arguments& a) { a.lse_partial = Tensor(); });
  wrong(value, "out", "required", [](Memory&, Arguments& a) { a.out = Tensor(); });
  wrong(type, "out_partial", "got bfloat16",
        [](Memory& memory, Arguments& a) { a.out_partial = of_type(memory, a.out_partial, bfloat16); });
  wrong(type, "lse_partial", "got float64",
        [](Memory& memory, Arguments& a) { a.lse_partial = of_type(memory, a.lse_partial, float64); });
  wrong(type, "out", "got float8_e4m3fn",
        [](Memory& memory, Arguments& a) { a.out = of_type(memory, a.out, float8_e4m3fn); });
  wrong(type, "lse", "got float16", [](Memory& memory, Arguments& a) { a.lse = of_type(memory, a.lse, float16); });
  wrong(value, "out_partial", "got", [](Memory& memory, Arguments& a) {
    a.out_partial = memory.tensor(float32, {2, 3, 4, 5});
  });
  wrong(value, "lse_partial", "got",
        [](Memory& memory, Arguments& a) { a.lse_partial = resized(memory, a.lse_partial, 0, 3); });
  wrong(value, "out", "got", [](Memory& memory, Arguments& a) { a.out = resized(memory, a.out, 3, 7); });
  wrong(value, "lse", "got", [](Memory& memory, Arguments& a) { a.lse = resized(memory, a.lse, 2, 4); });
  wrong(value, "out_partial", "contiguous",
        [](Memory& memory, Arguments& a) { a.out_partial = spread(memory, a.out_partial); });
  wrong(value, "out", "contiguous", [](Memory& memory, Arguments& a) { a.out = spread(memory, a.out); });
  wrong(value, "lse_partial", "cuda:0", [](Memory&, Arguments& a) { a.lse_partial = on(a.lse_partial, cuda); });
  wrong(value, "out", "cuda:0", [](Memory&, Arguments& a) { a.out = on(a.out, cuda); });
  wrong(value, "lse", "cuda:0", [](Memory&, Arguments& a) { a.lse = on(a.lse, cuda); });
  wrong(value, "out", "out_partial", [](Memory&, Arguments& a) { a.out = slice(a.out_partial, 1); });
  wrong(value, "out", "lse_partial", [](Memory&, Arguments& a) {
    a.lse_partial = view(a.out, a.out.data(), {2, 1, 3, 2}, {6, 6, 2, 1});
  });
  wrong(value, "out", "out_partial", [](Memory& memory, Arguments& a) {  // heads outside rows
    a.out_partial = memory.tensor(float32, {2, 1, 3, 2, 8}, {48, 48, 8, 24, 1});
    a.out = slice(a.out_partial, 1);
  });
  for (const Wrong<Arguments>& item : list) {
    SCOPED_TRACE(item.name + ", " + item.mentions);
    Memory memory;
    Arguments a;
    a.out_partial = memory.tensor(float32, {2, 1, 3, 2, 8});
    a.lse_partial = memory.tensor(float32, {2, 1, 3, 2});
    a.out = memory.tensor(float32, {1, 3, 2, 8});
    a.lse = memory.tensor(float32, {1, 3, 2});
    item.change(memory, a);
    memory.remember();
    expect_error(item.kind, item.name, item.mentions, [&] { combine(a); });
    EXPECT_TRUE(memory.unchanged());
  }
}

/// Without a look at memory, which on a GPU the host does not take.
TEST(AttentionArguments, ShapesTellLengths) {
  const auto error_of = [](Base base, const std::function<void(Memory&, AttentionArguments&)>& change) -> std::string {
    Memory memory;
    AttentionArguments a = make_call(memory, base);
    change(memory, a);
    try {
      make_problem(a, {});
    } catch (const Error& error) {
      return error.what();
    }
    return "";
  };
  using Arguments = AttentionArguments;
  const auto no_lengths = [](Arguments& a) { a.seqused_q = a.seqused_k = Tensor(); };
  EXPECT_EQ(error_of(Base::normal, [&](Memory&, Arguments& a) { no_lengths(a), a.max_seqlen_q = 2; }),
            "max_seqlen_q must be at least 3, the rows of q, got 2");
  EXPECT_EQ(error_of(Base::normal, [&](Memory&, Arguments& a) { no_lengths(a), a.max_seqlen_k = 5; }),
            "max_seqlen_k must be at least 6, the keys that k has room for, got 5");
  EXPECT_EQ(error_of(Base::normal, [&](Memory&, Arguments& a) { a.max_seqlen_q = a.max_seqlen_k = 1; }), "");
  EXPECT_EQ(error_of(Base::cache,
                     [](Memory& memory, Arguments& a) {
                       a.k_new = resized(memory, a.k_new, 1, 9);
                       a.v_new = resized(memory, a.v_new, 1, 9);
                     }),
            "k_new must fit the cache, which has 8 rows, got 9");
}

/// Bytes of small tensors of any strides, one by one.
TEST(Check, FindsWhatOverlaps) {
  Random random(0);
  alignas(16) static char memory[4096];
  const auto draw = [&] {
    const DLDataType dtype = random.one_of<DLDataType>({float32, bfloat16, float8_e4m3fn});
    std::vector<std::int64_t> shape, strides;
    for (int i = 0; i < 3; ++i) {
      shape.push_back(random.integer(1, 5));
      strides.push_back(random.one_of<std::int64_t>({1, 2, 4, 5, 8, 12, 20, 24, -8, 0}));
    }
    char* const data = memory + 2048 + random.integer(-40, 40) * 4;
    return Tensor(DLTensor{data, {kDLCPU, 0}, 3, dtype, shape.data(), strides.data(), 0});
  };
  const auto bytes_of = [&](const Tensor& t) {
    std::set<std::int64_t> bytes;
    for (std::int64_t i = 0; i < t.size(0) * t.size(1) * t.size(2); ++i) {
      const std::int64_t at = i % t.size(0) * t.stride(0) + i / t.size(0) % t.size(1) * t.stride(1) +
                              i / t.size(0) / t.size(1) * t.stride(2);
      const std::int64_t size = t.dtype().bits / 8;
      for (std::int64_t byte = 0; byte < size; ++byte) {
        bytes.insert(static_cast<const char*>(t.data()) - memory + at * size + byte);
      }
    }
    return bytes;
  };
  int overlapping = 0;
  for (int n = 0; n < 20'000; ++n) {
    const Tensor a = draw();
    const Tensor b = draw();
    const std::set<std::int64_t> of_a = bytes_of(a);
    bool expected = false;
    for (const std::int64_t byte : bytes_of(b)) expected |= of_a.count(byte) > 0;
    bool found = false;
    try {
      check_disjoint("a", a, "b", b);
    } catch (const Error&) {
      found = true;
    }
    ASSERT_EQ(found, expected) << n;
    overlapping += expected;
  }
  EXPECT_GT(overlapping, 2'000);
  EXPECT_LT(overlapping, 18'000);
}

}  // namespace
}  // namespace mate
