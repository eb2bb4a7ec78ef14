// The public calls, end to end on the CPU, against the float64 reference of reference.h.
#include <gtest/gtest.h>
#include <mate/attention.h>
#include <sys/mman.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "call_of_one.h"
#include "memory.h"
#include "random.h"
#include "random_call.h"
#include "reference.h"

namespace mate {
namespace {

using namespace testing;

constexpr double infinity = std::numeric_limits<double>::infinity();

struct Shape {
  std::int64_t b = 1, sq = 1, sk = 1, heads_q = 1, heads_k = 1, d = 16, dv = 16;
};

/// A call with contiguous tensors of random numbers and no options.
AttentionArguments contiguous_call(Memory& memory, const Shape& shape, DLDataType dtype = float32,
                                   std::uint64_t seed = 0) {
  Random random(seed);
  AttentionArguments a;
  a.q = memory.tensor(dtype, {shape.b, shape.sq, shape.heads_q, shape.d});
  a.k = memory.tensor(dtype, {shape.b, shape.sk, shape.heads_k, shape.d});
  a.v = memory.tensor(dtype, {shape.b, shape.sk, shape.heads_k, shape.dv});
  for (const Tensor& tensor : {a.q, a.k, a.v}) fill(tensor, [&] { return random.normal(); });
  a.out = memory.tensor(dtype == float8_e4m3fn ? bfloat16 : dtype, {shape.b, shape.sq, shape.heads_q, shape.dv});
  a.lse = memory.tensor(float32, {shape.b, shape.heads_q, shape.sq});
  return a;
}

TEST(RandomCalls, MatchTheReference) {
  int failures = 0;
  for (std::uint64_t seed = 0; seed < 800 && failures < 5; ++seed) {
    RandomCall call(seed);
    const std::string wrong = judge(call.memory, call.arguments);
    if (wrong.empty()) continue;
    ADD_FAILURE() << "seed " << seed << ": " << wrong;
    ++failures;
  }
}

TEST(RandomCalls, GiveTheSameBitsForTheSameCall) {
  for (std::uint64_t seed = 10000; seed < 10100; ++seed) {
    RandomCall call(seed);
    attention(call.arguments);
    call.memory.remember();
    attention(call.arguments);
    EXPECT_TRUE(call.memory.unchanged()) << "seed " << seed;
  }
}

TEST(RandomCalls, GiveTheSameBitsWithFreshMetadata) {
  bool some_split = false;
  for (std::uint64_t seed = 20000; seed < 20150; ++seed) {
    RandomCall call(seed);
    AttentionArguments& a = call.arguments;
    a.scheduler_metadata = Tensor();
    a.num_splits = 0;
    attention(a);

    SchedulerMetadataArguments lengths;
    const std::vector<CallSequence> sequences = sequences_of(a);
    lengths.batch_size = static_cast<std::int64_t>(sequences.size());
    lengths.max_seqlen_q = a.q.ndim() == 4 ? a.q.size(1) : *a.max_seqlen_q;
    lengths.num_heads_q = a.q.size(-2);
    lengths.num_heads_kv = a.k.size(-2);
    lengths.headdim = a.q.size(-1);
    lengths.headdim_v = a.v.size(-1);
    lengths.qkv_dtype = a.q.dtype();
    lengths.kv_dtype = a.k.dtype();
    lengths.seqused_k = a.seqused_k;
    lengths.cu_seqlens_q = a.cu_seqlens_q;
    lengths.cu_seqlens_k = a.cu_seqlens_k;
    lengths.cu_seqlens_k_new = a.cu_seqlens_k_new;
    lengths.seqused_q = a.seqused_q;
    lengths.cache_leftpad = a.cache_leftpad;
    if (a.page_table.given()) lengths.page_size = a.k.size(1);
    if (a.k_new.given() && a.k_new.ndim() == 4) lengths.max_seqlen_k_new = a.k_new.size(1);
    lengths.causal = a.causal;
    lengths.window_left = a.window_left;
    lengths.window_right = a.window_right;
    lengths.attention_chunk = a.attention_chunk;
    lengths.has_softcap = a.softcap > 0;
    lengths.has_qv = a.qv.given();
    lengths.pack_gqa = a.pack_gqa;
    lengths.sm_margin = a.sm_margin;
    lengths.cp_world_size = a.cp_world_size;
    lengths.cp_rank = a.cp_rank;
    lengths.cp_tot_seqused_k = a.cp_tot_seqused_k;
    lengths.batch_invariant = a.batch_invariant;
    for (const CallSequence& s : sequences) lengths.max_seqlen_k = std::max(lengths.max_seqlen_k, s.sk());
    if (!a.seqused_k.given() && !a.cu_seqlens_k.given()) {
      const std::int64_t capacity = a.k.size(1) * (a.page_table.given() ? a.page_table.size(1) : 1);
      lengths.seqused_k = call.memory.integers(std::vector<std::int64_t>(sequences.size(), capacity));
      lengths.max_seqlen_k = std::max(lengths.max_seqlen_k, capacity);
    }
    lengths.out = call.memory.tensor(int32, {scheduler_metadata_size(lengths.batch_size)}, {2});
    call.memory.remember();
    scheduler_metadata(lengths);
    call.memory.permit(lengths.out);
    EXPECT_TRUE(call.memory.unchanged()) << "seed " << seed << ": more than out was written";

    a.scheduler_metadata = lengths.out;
    call.memory.remember();
    attention(a);
    EXPECT_TRUE(call.memory.unchanged()) << "seed " << seed;
    for_each_element(lengths.out, [&](const std::byte* at) { some_split |= read_at(lengths.out, at) > 1; });
  }
  EXPECT_TRUE(some_split || std::thread::hardware_concurrency() == 1) << "no call had its keys split";
}

TEST(RandomCalls, AreBatchInvariantWhereAsked) {
  for (std::uint64_t seed = 30000; seed < 30150; ++seed) {
    RandomCall call(seed);
    AttentionArguments& a = call.arguments;
    if (a.rotary_cos.given()) continue;  // its queries are not those of the call below
    a.batch_invariant = true;
    attention(a);
    for (const CallSequence& s : sequences_of(a)) {
      Memory memory;
      const AttentionArguments alone = call_of_one(memory, a, s);
      attention(alone);
      EXPECT_EQ(result_bits(a, s), result_bits(alone, sequence_alone(s))) << "seed " << seed << ", sequence " << s.b;
    }
  }
}

TEST(Attention, ServesEachTypeOverManyBlocksAndTiles) {
  for (const DLDataType dtype : {float32, float16, bfloat16, float8_e4m3fn}) {
    for (const bool causal : {false, true}) {
      for (const std::int64_t splits : {0, 3}) {
        Memory memory;
        AttentionArguments prefill =
            contiguous_call(memory, {.sq = 70, .sk = 200, .heads_q = 2, .heads_k = 1, .d = 8, .dv = 12}, dtype);
        prefill.causal = causal;
        prefill.num_splits = splits;
        EXPECT_EQ(judge(memory, prefill), "") << "prefill";

        AttentionArguments decode =
            contiguous_call(memory, {.b = 2, .sk = 1500, .heads_q = 4, .heads_k = 2, .d = 16, .dv = 8}, dtype);
        decode.causal = causal;
        decode.num_splits = splits;
        EXPECT_EQ(judge(memory, decode), "") << "decode";
      }
    }
  }
}

TEST(Attention, ServesTheLargestHeads) {
  for (const DLDataType dtype : {float32, bfloat16}) {
    Memory memory;
    AttentionArguments a =
        contiguous_call(memory, {.b = 2, .sq = 3, .sk = 70, .heads_q = 2, .d = 512, .dv = 512}, dtype);
    Random random(1);
    a.qv = memory.tensor(dtype, {2, 3, 2, 512});
    fill(a.qv, [&] { return random.normal(); });
    EXPECT_EQ(judge(memory, a), "");
  }
}

TEST(Attention, ServesEmptyCalls) {
  Memory memory;
  for (const Shape& shape : {Shape{.b = 0, .sq = 3, .sk = 5}, Shape{.b = 2, .sq = 0, .sk = 5},
                             Shape{.b = 2, .sq = 3, .sk = 0}, Shape{.b = 0, .sq = 0, .sk = 0}}) {
    AttentionArguments a = contiguous_call(memory, shape);
    EXPECT_EQ(judge(memory, a), "");
    a.causal = true;
    a.num_splits = 4;
    EXPECT_EQ(judge(memory, a), "");
  }
  AttentionArguments ragged;
  ragged.q = memory.tensor(bfloat16, {0, 2, 8});
  ragged.k = ragged.v = memory.tensor(bfloat16, {0, 1, 8});
  ragged.out = memory.tensor(bfloat16, {0, 2, 8});
  ragged.lse = memory.tensor(float32, {2, 0});
  ragged.max_seqlen_q = ragged.max_seqlen_k = 0;
  for (const std::vector<std::int64_t>& offsets : {std::vector<std::int64_t>{0}, {0, 0, 0}}) {
    ragged.cu_seqlens_q = ragged.cu_seqlens_k = memory.integers(offsets);
    EXPECT_EQ(judge(memory, ragged), "");
  }
}

TEST(Attention, ServesNoQueryHeads) {
  Memory memory;
  for (const std::int64_t num_splits : {1, 2}) {
    AttentionArguments a = contiguous_call(memory, {.sq = 3, .sk = 3000, .heads_q = 0});
    a.num_splits = num_splits;
    EXPECT_EQ(judge(memory, a), "");
  }
}

TEST(Attention, RowsWithoutKeysAreZeroAndTheirLseIsTheSink) {
  Memory memory;
  AttentionArguments a = contiguous_call(memory, {.sq = 4, .sk = 2, .heads_q = 2, .heads_k = 2});
  a.causal = true;  // rows 0 and 1 see nothing
  attention(a);
  for (std::int64_t head = 0; head < 2; ++head) {
    EXPECT_EQ(read(a.lse, 0, head, 1), -infinity);
    EXPECT_EQ(read(a.out, 0, 1, head, 3), 0);
    EXPECT_TRUE(std::isfinite(read(a.lse, 0, head, 2)));
  }
  a.learnable_sink = memory.tensor(float32, {2});
  write(a.learnable_sink, -1.5, 0);
  write(a.learnable_sink, 2.25, 1);
  EXPECT_EQ(judge(memory, a), "");
  EXPECT_EQ(read(a.lse, 0, 0, 1), -1.5);
  EXPECT_EQ(read(a.lse, 0, 1, 1), 2.25);
  EXPECT_EQ(read(a.out, 0, 1, 1, 3), 0);
}

TEST(Attention, ScoresOfMinusInfinityCountAsNothing) {
  for (const std::int64_t splits : {1, 3}) {
    Memory memory;
    AttentionArguments a = contiguous_call(memory, {.sq = 1, .sk = 300, .d = 1});
    a.num_splits = splits;
    write(a.q, 1, 0, 0, 0, 0);
    fill(a.k, [] { return -infinity; });
    attention(a);
    EXPECT_EQ(read(a.lse, 0, 0, 0), -infinity);
    for (std::int64_t e = 0; e < a.out.size(-1); ++e) EXPECT_EQ(read(a.out, 0, 0, 0, e), 0);

    a.learnable_sink = memory.tensor(bfloat16, {1});
    write(a.learnable_sink, 0.5, 0);
    attention(a);
    EXPECT_EQ(read(a.lse, 0, 0, 0), 0.5);
    EXPECT_EQ(read(a.out, 0, 0, 0, 0), 0);

    // One key that counts is as if it were alone.
    a.learnable_sink = Tensor();
    write(a.k, 0.75, 0, 77, 0, 0);
    a.softmax_scale = 2;
    attention(a);
    EXPECT_NEAR(read(a.lse, 0, 0, 0), 1.5, 1e-6);
    EXPECT_NEAR(read(a.out, 0, 0, 0, 5), read(a.v, 0, 77, 0, 5), 1e-6);
  }
}

TEST(Attention, AScoreOfPlusInfinityMakesNaN) {
  Memory memory;
  AttentionArguments a = contiguous_call(memory, {.sq = 2, .sk = 100, .d = 1});
  write(a.q, 1, 0, 0, 0, 0);
  write(a.q, 0.5, 0, 1, 0, 0);
  write(a.k, infinity, 0, 99, 0, 0);
  a.causal = true;  // the last row alone sees the last key
  attention(a);
  EXPECT_TRUE(std::isnan(read(a.out, 0, 1, 0, 0)));
  EXPECT_FALSE(std::isfinite(read(a.lse, 0, 0, 1)));
  EXPECT_NE(read(a.lse, 0, 0, 1), -infinity);
  EXPECT_TRUE(std::isfinite(read(a.out, 0, 0, 0, 0)));
}

TEST(Attention, ANonFiniteKeyReachesOnlyTheRowsThatSeeIt) {
  constexpr std::int64_t length = 80;
  for (const double poison : {std::numeric_limits<double>::quiet_NaN(), infinity, -infinity}) {
    for (const DLDataType dtype : {float32, bfloat16}) {
      Memory memory;
      AttentionArguments a = contiguous_call(memory, {.sq = length, .sk = length, .heads_q = 2}, dtype);
      a.window_left = 10;
      a.window_right = 3;
      attention(a);
      const std::vector<CallSequence> sequences = sequences_of(a);
      std::vector<std::vector<std::uint32_t>> clean;
      CallSequence row = sequences[0];
      row.sq = 1;
      for (row.first_row = 0; row.first_row < length; ++row.first_row) clean.push_back(result_bits(a, row));

      constexpr std::int64_t poisoned = 66;
      for (std::int64_t e = 0; e < a.k.size(-1); ++e) write(a.k, poison, 0, poisoned, 0, e);
      attention(a);
      for (row.first_row = 0; row.first_row < length; ++row.first_row) {
        const bool sees = visible(mask_of(a), row.first_row, poisoned, length, length, length);
        if (!sees) {
          EXPECT_EQ(result_bits(a, row), clean[row.first_row]) << "row " << row.first_row;
        } else if (std::isnan(poison)) {
          EXPECT_TRUE(std::isnan(read(a.out, 0, row.first_row, 1, 0))) << "row " << row.first_row;
        }
      }
    }
  }
}

TEST(Attention, ANonFiniteValueReachesTheRowsThatSeeIt) {
  Memory memory;
  AttentionArguments a = contiguous_call(memory, {.sq = 2, .sk = 100});
  a.causal = true;
  write(a.v, infinity, 0, 50, 0, 3);
  write(a.v, std::numeric_limits<double>::quiet_NaN(), 0, 51, 0, 4);
  attention(a);
  for (std::int64_t i = 0; i < 2; ++i) {
    EXPECT_EQ(read(a.out, 0, i, 0, 3), infinity);
    EXPECT_TRUE(std::isnan(read(a.out, 0, i, 0, 4)));
    EXPECT_TRUE(std::isfinite(read(a.out, 0, i, 0, 5)));
    EXPECT_TRUE(std::isfinite(read(a.lse, 0, 0, i)));
  }
}

TEST(Attention, AScaleOfZeroIsUniform) {
  Memory memory;
  AttentionArguments a = contiguous_call(memory, {.sq = 1, .sk = 37});
  a.softmax_scale = 0;
  EXPECT_EQ(judge(memory, a), "");
  EXPECT_NEAR(read(a.lse, 0, 0, 0), std::log(37), 1e-6);
}

TEST(Attention, QuantisesAppendedKeysOnceAndSaturates) {
  Memory memory;
  Random random(3);
  AttentionArguments a;
  a.q = memory.tensor(bfloat16, {1, 1, 1, 8});
  a.k = memory.tensor(float8_e4m3fn, {1, 4, 1, 8});
  a.v = memory.tensor(float8_e4m3fn, {1, 4, 1, 8});
  a.k_new = memory.tensor(bfloat16, {1, 1, 1, 8});
  a.v_new = memory.tensor(bfloat16, {1, 1, 1, 8});
  a.k_descale = memory.tensor(float32, {1, 1});
  a.v_descale = memory.tensor(float32, {1, 1});
  write(a.k_descale, 0.5, 0, 0);
  write(a.v_descale, 7, 0, 0);
  for (const Tensor& tensor : {a.q, a.k, a.v}) fill(tensor, [&] { return random.normal(); });
  fill(a.k_new, [] { return 1000.0; });
  fill(a.v_new, [] { return -0.68359375; });  // a seventh of it is a tie, which goes to even
  a.seqused_k = memory.integers({2});
  a.out = memory.tensor(bfloat16, {1, 1, 1, 8});
  EXPECT_EQ(judge(memory, a), "");
  EXPECT_EQ(read(a.k, 0, 2, 0, 5), 448);
  EXPECT_EQ(read(a.v, 0, 2, 0, 5), -0.09375);
}

TEST(Attention, DecodesStepByStepWhatItPrefills) {
  constexpr std::int64_t length = 70;
  constexpr std::int64_t page_size = 16;
  Memory memory;
  AttentionArguments prefill = contiguous_call(memory, {.sq = length, .sk = length, .heads_q = 4, .heads_k = 2});
  prefill.causal = true;
  attention(prefill);

  AttentionArguments step;
  step.k = memory.tensor(float32, {5, page_size, 2, 16});
  step.v = memory.tensor(float32, {5, page_size, 2, 16});
  step.page_table = memory.tensor(int32, {1, 5});
  for (std::int64_t page = 0; page < 5; ++page) write(step.page_table, static_cast<double>(4 - page), 0, page);
  step.out = memory.tensor(float32, {1, 1, 4, 16});
  step.lse = memory.tensor(float32, {1, 4, 1});
  step.causal = true;
  const auto row_of = [](const Tensor& tensor, std::int64_t row) {
    return view(tensor, address(tensor, 0, row), {1, 1, tensor.size(2), tensor.size(3)},
                {0, 0, tensor.stride(2), tensor.stride(3)});
  };
  for (std::int64_t t = 0; t < length; ++t) {
    step.q = row_of(prefill.q, t);
    step.k_new = row_of(prefill.k, t);
    step.v_new = row_of(prefill.v, t);
    step.seqused_k = memory.integers({t});
    attention(step);
    for (std::int64_t head = 0; head < 4; ++head) {
      ASSERT_NEAR(read(step.lse, 0, head, 0), read(prefill.lse, 0, head, t), 1e-5) << "step " << t;
      for (std::int64_t e = 0; e < 16; ++e) {
        ASSERT_NEAR(read(step.out, 0, 0, head, e), read(prefill.out, 0, t, head, e), 1e-5) << "step " << t;
      }
    }
  }
}

// Reserves address space without memory behind it until it is touched.
class AddressSpace {
 public:
  explicit AddressSpace(std::size_t bytes)
      : bytes_(bytes),
        data_(mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0)) {}
  ~AddressSpace() {
    if (reserved()) munmap(data_, bytes_);
  }
  AddressSpace(const AddressSpace&) = delete;

  bool reserved() const { return data_ != MAP_FAILED; }
  void* data() const { return data_; }

 private:
  std::size_t bytes_;
  void* data_;
};

TEST(Attention, CountsOffsetsIn64Bits) {
  constexpr std::int64_t elements = (std::int64_t{1} << 32) + 1024;
  const AddressSpace k(elements * 2);
  const AddressSpace v(elements * 2);
  if (!k.reserved() || !v.reserved()) GTEST_SKIP() << "no 16 GiB of address space";
  // Strides of batch entries, of rows and of heads that are past 2**31 elements, in turn.
  constexpr std::int64_t far = std::int64_t{1} << 31;
  for (const std::vector<std::int64_t>& strides :
       {std::vector<std::int64_t>{far, 64, 32, 1}, {128, far, 32, 1}, {128, 64, far, 1}}) {
    Memory memory;
    Random random(5);
    AttentionArguments a = contiguous_call(memory, {.b = 2, .sq = 1, .sk = 2, .heads_q = 2, .heads_k = 2}, bfloat16);
    a.k = view(a.k, k.data(), {2, 2, 2, 16}, strides);
    a.v = view(a.v, v.data(), {2, 2, 2, 16}, strides);
    fill(a.k, [&] { return random.normal(); });
    fill(a.v, [&] { return random.normal(); });
    EXPECT_EQ(judge(memory, a), "");
  }
}

TEST(Attention, ServesSeveralThreadsAtOnce) {
  constexpr int threads = 4;
  std::vector<Memory> memory(threads);
  std::vector<AttentionArguments> calls;
  for (int i = 0; i < threads; ++i) {
    calls.push_back(
        contiguous_call(memory[i], {.b = 2, .sq = 3, .sk = 2000, .heads_q = 4, .heads_k = 2, .d = 64}, float32, i));
    calls[i].num_splits = 4;
    attention(calls[i]);
    memory[i].remember();
  }
  std::vector<std::thread> callers;
  for (int i = 0; i < threads; ++i) {
    callers.emplace_back([&, i] {
      for (int n = 0; n < 5; ++n) attention(calls[i]);
    });
  }
  for (std::thread& caller : callers) caller.join();
  for (int i = 0; i < threads; ++i) EXPECT_TRUE(memory[i].unchanged()) << "thread " << i;
}

TEST(Combine, MatchesTheReference) {
  for (std::uint64_t seed = 0; seed < 200; ++seed) {
    SCOPED_TRACE(seed);
    Random random(seed);
    Memory memory;
    const std::int64_t splits = random.one_of<std::int64_t>({1, 2, 3, 17, 256});
    const std::int64_t b = random.integer(0, 3), s = random.integer(0, 4), h = random.integer(1, 3);
    const std::int64_t dv = random.one_of<std::int64_t>({1, 2, 7, 16, 65});
    CombineArguments a;
    const std::int64_t row = dv + random.integer(0, 3);
    a.out_partial = random.chance(0.5) ? memory.tensor(float32, {splits, b, s, h, dv})
                                       : memory.tensor(float32, {splits, b, s, h, dv},
                                                       {row, row * splits * h * s, row * splits, row * splits * s, 1});
    // As attention() writes it, (splits, b, h, s), or in the order of the argument.
    a.lse_partial = random.chance(0.5) ? memory.tensor(float32, {splits, b, s, h}, {b * s * h, s * h, 1, s})
                                       : memory.tensor(float32, {splits, b, s, h});
    a.out = memory.tensor(random.one_of<DLDataType>({float32, float16, bfloat16}), {b, s, h, dv});
    if (random.chance(0.7)) a.lse = memory.tensor(float32, {b, s, h}, {s * h, 1, s});
    // What a split that saw nothing left in its part of out is not read: it stays NaN.
    const double nothing = random.one_of<double>({0, 0.3, 1});
    for (std::int64_t i = 0; i < splits * b * s * h; ++i) {
      const std::int64_t head = i % h, r = i / h % s, batch = i / h / s % b, split = i / h / s / b;
      if (random.chance(nothing)) {
        write(a.lse_partial, -infinity, split, batch, r, head);
        continue;
      }
      write(a.lse_partial, random.uniform(-20, 20), split, batch, r, head);
      for (std::int64_t e = 0; e < dv; ++e) write(a.out_partial, random.normal(), split, batch, r, head, e);
    }

    memory.remember();
    combine(a);
    memory.permit(a.out);
    memory.permit(a.lse);
    EXPECT_TRUE(memory.unchanged());
    const double epsilon = a.out.dtype() == float32 ? 1e-6 : a.out.dtype() == float16 ? 0x1p-11 : 0x1p-8;
    for (std::int64_t i = 0; i < b * s * h; ++i) {
      const std::int64_t head = i % h, r = i / h % s, batch = i / h / s;
      double max = -infinity;
      for (std::int64_t split = 0; split < splits; ++split) {
        max = std::max(max, read(a.lse_partial, split, batch, r, head));
      }
      double sum = 0;
      std::vector<double> expected(dv, 0);
      for (std::int64_t split = 0; split < splits && max > -infinity; ++split) {
        const double lse = read(a.lse_partial, split, batch, r, head);
        if (lse == -infinity) continue;
        sum += std::exp(lse - max);
        for (std::int64_t e = 0; e < dv; ++e) {
          expected[e] += std::exp(lse - max) * read(a.out_partial, split, batch, r, head, e);
        }
      }
      const double lse = max == -infinity ? -infinity : max + std::log(sum);
      if (a.lse.given()) {
        const double got = read(a.lse, batch, r, head);
        EXPECT_TRUE(got == lse || std::abs(got - lse) < 1e-5) << got << ", not " << lse;
      }
      for (std::int64_t e = 0; e < dv; ++e) {
        const double want = max == -infinity ? 0 : expected[e] / sum;
        ASSERT_NEAR(read(a.out, batch, r, head, e), want, epsilon * std::max(1.0, std::abs(want)));
      }
    }
  }
}

TEST(Combine, OfTheRanksOfContextParallelIsTheWhole) {
  constexpr std::int64_t world = 3;
  const Shape shape{.b = 2, .sq = 9, .sk = 200, .heads_q = 4, .heads_k = 2, .d = 32, .dv = 24};
  for (const bool with_sink : {false, true}) {
    for (const int left : {-1, 30}) {
      Memory memory;
      AttentionArguments whole = contiguous_call(memory, shape);
      whole.causal = true;
      whole.window_left = left;
      if (with_sink) {
        whole.learnable_sink = memory.tensor(float32, {shape.heads_q});
        fill(whole.learnable_sink, [] { return 1.0; });
      }
      attention(whole);

      CombineArguments merge;
      merge.out_partial = memory.tensor(float32, {world, shape.b, shape.sq, shape.heads_q, shape.dv});
      const std::int64_t rows = shape.heads_q * shape.sq;
      merge.lse_partial =
          memory.tensor(float32, {world, shape.b, shape.sq, shape.heads_q}, {shape.b * rows, rows, 1, shape.sq});
      for (std::int64_t rank = 0; rank < world; ++rank) {
        AttentionArguments part = whole;
        const std::int64_t share = (shape.sk - rank + world - 1) / world;
        const auto keys_of_rank = [&](const Tensor& all) {
          return view(all, address(all, 0, rank), {shape.b, share, all.size(2), all.size(3)},
                      {all.stride(0), all.stride(1) * world, all.stride(2), 1});
        };
        part.k = keys_of_rank(whole.k);
        part.v = keys_of_rank(whole.v);
        part.cp_world_size = world;
        part.cp_rank = rank;
        part.cp_tot_seqused_k = memory.integers(std::vector<std::int64_t>(shape.b, shape.sk));
        if (rank > 0) part.learnable_sink = Tensor();
        part.out = slice(merge.out_partial, rank);
        const Tensor lse = slice(merge.lse_partial, rank);
        part.lse = view(lse, lse.data(), {shape.b, shape.heads_q, shape.sq}, {rows, shape.sq, 1});
        EXPECT_EQ(judge(memory, part), "") << "rank " << rank;
      }
      merge.out = memory.tensor(float32, {shape.b, shape.sq, shape.heads_q, shape.dv});
      merge.lse = memory.tensor(float32, {shape.b, shape.sq, shape.heads_q}, {rows, 1, shape.sq});
      combine(merge);
      AttentionArguments merged = whole;
      merged.out = merge.out;
      merged.lse = view(merge.lse, merge.lse.data(), {shape.b, shape.heads_q, shape.sq}, {rows, shape.sq, 1});
      EXPECT_EQ(difference(merged, evaluate(whole), tolerance_of(merged)), "");
    }
  }
}

TEST(Combine, OfNoPartsIsNothing) {
  Memory memory;
  CombineArguments a;
  a.out_partial = memory.tensor(float32, {0, 1, 2, 3, 4});
  a.lse_partial = memory.tensor(float32, {0, 1, 2, 3});
  a.out = memory.tensor(float32, {1, 2, 3, 4});
  a.lse = memory.tensor(float32, {1, 2, 3});
  combine(a);
  for_each_element(a.out, [&](const std::byte* at) { EXPECT_EQ(read_at(a.out, at), 0); });
  for_each_element(a.lse, [&](const std::byte* at) { EXPECT_EQ(read_at(a.lse, at), -infinity); });
}

TEST(DescribeBackends, NamesTheProcessors) { EXPECT_NE(describe_backends().find("cpu"), std::string::npos); }

}  // namespace
}  // namespace mate
