// The kernels of the NVIDIA backend on a GPU that is emulated: random calls of attention() are made of tensors that say
// they are on a GPU, and judged as those on the CPU are. Nothing here says how fast a kernel is, nor whether its
// threads race: they run in turns.
#include <dlfcn.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <filesystem>
#include <string>
#include <utility>
#include <vector>

#include "cpp/call_of_one.h"
#include "cpp/random_call.h"

namespace mate {
namespace {

namespace fs = std::filesystem;

/// Memory of the process that a tensor says is a GPU's.
void move_to_gpu(Tensor& tensor) {
  if (!tensor.given()) return;
  std::vector<std::int64_t> shape(tensor.shape(), tensor.shape() + tensor.ndim());
  std::vector<std::int64_t> strides;
  for (int i = 0; i < tensor.ndim(); ++i) strides.push_back(tensor.stride(i));
  tensor =
      Tensor(DLTensor{tensor.data(), {kDLCUDA, 0}, tensor.ndim(), tensor.dtype(), shape.data(), strides.data(), 0});
}

void move_to_gpu(AttentionArguments& a) {
  for (Tensor* tensor : {&a.q,
                         &a.k,
                         &a.v,
                         &a.qv,
                         &a.out,
                         &a.lse,
                         &a.cu_seqlens_q,
                         &a.cu_seqlens_k,
                         &a.seqused_q,
                         &a.seqused_k,
                         &a.page_table,
                         &a.cache_batch_idx,
                         &a.cache_leftpad,
                         &a.k_new,
                         &a.v_new,
                         &a.cu_seqlens_k_new,
                         &a.rotary_cos,
                         &a.rotary_sin,
                         &a.rotary_seqlens,
                         &a.q_descale,
                         &a.k_descale,
                         &a.v_descale,
                         &a.learnable_sink,
                         &a.cp_tot_seqused_k,
                         &a.scheduler_metadata}) {
    move_to_gpu(*tensor);
  }
}

bool is_served(const AttentionArguments& a) { return a.q.dtype() != float32; }

/// That of the CPU, but where e4m3 may be multiplied as it is.
testing::Tolerance tolerance_of(const AttentionArguments& a) {
  return a.q.dtype() == float8_e4m3fn ? testing::Tolerance{4e-2, 5e-3} : testing::tolerance_of(a);
}

class EmulatedGpu : public ::testing::Test {
 protected:
  static void SetUpTestSuite() {
    // The library finds the driver and the compiler as it would those of a machine with a GPU.
    ASSERT_NE(dlopen(MATE_DRIVER, RTLD_NOW | RTLD_GLOBAL), nullptr) << dlerror();
    std::string folder = fs::temp_directory_path() / "mate-emulated-gpu-XXXXXX";
    ASSERT_NE(mkdtemp(folder.data()), nullptr);
    folder_ = folder;
    setenv("TMPDIR", folder.c_str(), 1);
    setenv("MATE_CACHE_DIR", (folder_ / "cache").c_str(), 1);
    setenv("MATE_NVRTC", MATE_COMPILER, 1);
  }
  static void TearDownTestSuite() { fs::remove_all(folder_); }

  static inline fs::path folder_;
};

/// Makes so many calls, or MATE_RANDOM_CALLS, from the seed MATE_SEED on; find_wrong(call) says what is wrong with one.
template <typename FindWrong>
void for_random_calls(testing::RandomCall::Kind kind, std::uint64_t otherwise, const FindWrong& find_wrong) {
  const auto number = [](const char* name, std::uint64_t otherwise) {
    const char* const text = std::getenv(name);
    return text == nullptr ? otherwise : std::strtoull(text, nullptr, 10);
  };
  const std::uint64_t first = number("MATE_SEED", 0);
  const std::uint64_t count = number("MATE_RANDOM_CALLS", otherwise);
  int failures = 0;
  for (std::uint64_t seed = first; seed < first + count && failures < 5; ++seed) {
    testing::RandomCall call(seed, kind);
    if (!is_served(call.arguments)) continue;
    move_to_gpu(call.arguments);
    const std::string wrong = find_wrong(call);
    if (wrong.empty()) continue;
    ADD_FAILURE() << "seed " << seed << ": " << wrong;
    ++failures;
  }
}

/// Compares so many calls with the reference.
void judge_calls(testing::RandomCall::Kind kind, std::uint64_t otherwise) {
  for_random_calls(kind, otherwise, [](testing::RandomCall& call) {
    return testing::judge(call.memory, call.arguments, tolerance_of(call.arguments));
  });
}

/// The names of the kernels that a call is the first to take, as the compiler tells.
std::string new_kernels_of(const AttentionArguments& a) {
  setenv("MATE_LOG", "compile", 1);
  ::testing::internal::CaptureStderr();
  attention(a);
  unsetenv("MATE_LOG");
  return ::testing::internal::GetCapturedStderr();
}

/// Judges a call with random queries, keys and values. Returns the names of the kernels that it is the first to take.
std::string judge_at_random(testing::Memory& memory, AttentionArguments& a) {
  testing::Random random(1);
  for (const Tensor& input : {a.q, a.k, a.v}) testing::fill(input, [&] { return random.uniform(-1, 1); });
  move_to_gpu(a);
  const std::string kernels = new_kernels_of(a);
  EXPECT_EQ(testing::judge(memory, a, tolerance_of(a)), "");
  return kernels;
}

TEST_F(EmulatedGpu, PlainCallsHaveKernelsOfTheirOwn) {
  constexpr std::int64_t heads = 2;
  constexpr std::int64_t size = 176;
  const auto kernels_of = [](bool with_sink, std::int64_t rows) {
    testing::Memory memory;
    AttentionArguments a;
    for (Tensor* tensor : {&a.q, &a.k, &a.v, &a.out}) *tensor = memory.tensor(bfloat16, {1, rows, heads, size});
    for (const Tensor& input : {a.q, a.k, a.v}) testing::fill(input, [] { return 1.0; });
    if (with_sink) {
      a.learnable_sink = memory.tensor(float32, {heads});
      testing::fill(a.learnable_sink, [] { return 0.0; });
    }
    move_to_gpu(a);
    return new_kernels_of(a);
  };
  EXPECT_NE(kernels_of(false, 5).find("_plain"), std::string::npos);
  EXPECT_NE(kernels_of(false, 256).find("_clusters"), std::string::npos);
  const std::string of_other = kernels_of(true, 5);
  EXPECT_NE(of_other.find("stream_"), std::string::npos) << of_other;
  EXPECT_EQ(of_other.find("_plain"), std::string::npos) << of_other;
}

/// The first block of a cluster may find many of them while the other is still busy.
TEST_F(EmulatedGpu, ClustersTakeTilesWithoutKeys) {
  testing::Memory memory;
  AttentionArguments a;
  a.causal = true;
  for (Tensor* tensor : {&a.q, &a.out}) *tensor = memory.tensor(bfloat16, {1, 1536, 4, 128});
  for (Tensor* tensor : {&a.k, &a.v}) *tensor = memory.tensor(bfloat16, {1, 256, 4, 128});
  const std::string kernels = judge_at_random(memory, a);
  EXPECT_NE(kernels.find("_clusters"), std::string::npos) << kernels;
}

TEST_F(EmulatedGpu, ClustersShareOutTheKeysOfFewTiles) {
  testing::Memory memory;
  AttentionArguments a;
  a.causal = true;
  a.num_splits = 0;
  for (Tensor* tensor : {&a.q, &a.out}) *tensor = memory.tensor(bfloat16, {1, 100, 1, 64});
  for (Tensor* tensor : {&a.k, &a.v}) *tensor = memory.tensor(bfloat16, {1, 1100, 1, 64});
  const std::string kernels = judge_at_random(memory, a);
  EXPECT_NE(kernels.find("_merged_plain"), std::string::npos) << kernels;
}

/// Each has the heads of one of two units, of few sequences or of more than a warp counts by itself.
TEST_F(EmulatedGpu, ClustersHaveManyHeadsOfAKeyHead) {
  constexpr std::int64_t heads = 128;
  std::string kernels;
  for (const auto& [batch, num_splits] : {std::pair<std::int64_t, std::int64_t>{2, 0}, {2, 3}, {33, 0}}) {
    testing::Memory memory;
    AttentionArguments a;
    a.causal = true;
    a.num_splits = num_splits;
    a.q = memory.tensor(bfloat16, {batch, 1, heads, 64});
    for (Tensor* tensor : {&a.qv, &a.out}) *tensor = memory.tensor(bfloat16, {batch, 1, heads, 128});
    testing::fill(a.qv, [count = 0]() mutable { return ++count % 7 * 0.1; });
    a.k = memory.tensor(bfloat16, {batch, 1500, 1, 64});
    a.v = memory.tensor(bfloat16, {batch, 1500, 1, 128});
    std::vector<std::int64_t> lengths(batch, 20);
    lengths[0] = 1500;
    lengths[1] = 130;
    a.seqused_k = memory.integers(lengths);
    kernels += judge_at_random(memory, a);
  }
  EXPECT_NE(kernels.find("_splits_clusters"), std::string::npos) << kernels;
}

/// Judges a call that decodes a token of each sequence.
void judge_decoding(const std::vector<std::int64_t>& lengths) {
  constexpr std::int64_t page_size = 64;
  constexpr std::int64_t size = 64;
  const auto batch = static_cast<std::int64_t>(lengths.size());
  const std::int64_t pages = *std::max_element(lengths.begin(), lengths.end()) / page_size + 1;
  testing::Memory memory;
  AttentionArguments a;
  a.causal = true;
  a.num_splits = 0;
  for (Tensor* tensor : {&a.q, &a.out}) *tensor = memory.tensor(bfloat16, {batch, 1, 4, size});
  for (Tensor* tensor : {&a.k, &a.v}) *tensor = memory.tensor(bfloat16, {batch * pages, page_size, 1, size});
  a.seqused_k = memory.integers(lengths);
  a.page_table = memory.tensor(int32, {batch, pages});
  for (std::int64_t b = 0; b < batch; ++b) {
    for (std::int64_t page = 0; page < pages; ++page) testing::write(a.page_table, batch * page + b, b, page);
  }
  judge_at_random(memory, a);
}

/// Of twelve workers, each of which would have parts of several tiles if all had as many blocks.
TEST_F(EmulatedGpu, EachWorkerMayHaveAPartOfOneTile) {
  judge_decoding({1500, 100, 900});
  judge_decoding({1500, 0, 2, 3, 600});
  judge_decoding({2200});
  judge_decoding({2200, 2200});
}

TEST_F(EmulatedGpu, ClustersServePromptsBesideDecodedTokens) {
  constexpr std::int64_t page_size = 64;
  constexpr std::int64_t size = 128;
  const std::vector<std::int64_t> lengths = {200, 500, 130};
  testing::Memory memory;
  AttentionArguments a;
  a.causal = true;
  a.window_left = 200;
  a.sm_margin = 8;  // so few multiprocessors are kept busy by whole tiles
  a.cu_seqlens_q = memory.integers({0, 1, 501, 601});
  a.max_seqlen_q = 500;
  for (Tensor* tensor : {&a.q, &a.out}) *tensor = memory.tensor(bfloat16, {601, 2, size});
  for (Tensor* tensor : {&a.k, &a.v}) *tensor = memory.tensor(bfloat16, {24, page_size, 1, size});
  a.seqused_k = memory.integers(lengths);
  a.page_table = memory.tensor(int32, {3, 300});  // with room for so many keys that two launches serve the call
  for (std::int64_t b = 0; b < 3; ++b) {
    for (std::int64_t page = 0; page < 300; ++page) testing::write(a.page_table, 8 * b + page % 8, b, page);
  }
  const std::string kernels = judge_at_random(memory, a);
  EXPECT_NE(kernels.find("_clusters"), std::string::npos) << kernels;
  EXPECT_NE(kernels.find("stream_"), std::string::npos) << kernels;
}

/// The host cannot know that it is, and then takes a tile to hold each sequence.
TEST_F(EmulatedGpu, RowsPastMaxSeqlenAreCleared) {
  constexpr std::int64_t batch = 3;
  constexpr std::int64_t rows = 210;
  constexpr std::int64_t heads = 2;
  constexpr std::int64_t size = 16;
  constexpr int begins[] = {0, 150, 151, rows};
  testing::Memory memory;
  AttentionArguments a;
  a.q = memory.tensor(bfloat16, {rows, heads, size});
  a.k = memory.tensor(bfloat16, {batch, 40, heads, size});
  a.v = memory.tensor(bfloat16, {batch, 40, heads, size});
  for (const Tensor& input : {a.q, a.k, a.v}) testing::fill(input, [] { return 1.0; });
  a.cu_seqlens_q = memory.tensor(int32, {batch + 1});
  for (std::int64_t b = 0; b <= batch; ++b) testing::write(a.cu_seqlens_q, begins[b], b);
  a.max_seqlen_q = 1;
  a.out = memory.tensor(bfloat16, {rows, heads, size});
  a.lse = memory.tensor(float32, {heads, rows});
  move_to_gpu(a);
  attention(a);
  for (std::int64_t row = 0; row < rows; ++row) {
    const bool computed = std::find(begins, begins + batch, row) < begins + batch;
    for (std::int64_t head = 0; head < heads; ++head) {
      EXPECT_EQ(std::isfinite(testing::read(a.lse, head, row)), computed) << row;
      for (std::int64_t i = 0; i < size; ++i) EXPECT_EQ(testing::read(a.out, row, head, i), computed ? 1 : 0) << row;
    }
  }
}

/// So many that a warp looks twice for that of a row, some without new keys, and rows before the first one's.
TEST_F(EmulatedGpu, NewKeysOfManySequencesArePacked) {
  constexpr std::int64_t batch = 70;
  constexpr std::int64_t capacity = 8;
  constexpr std::int64_t size = 16;
  std::vector<std::int64_t> begins = {2};
  for (std::int64_t b = 0; b < batch; ++b) begins.push_back(begins.back() + (b == 40 ? 6 : b % 3));
  testing::Memory memory;
  AttentionArguments a;
  a.q = memory.tensor(bfloat16, {batch, 1, 1, size});
  a.k_new = memory.tensor(bfloat16, {begins.back(), 1, size});
  a.v_new = memory.tensor(bfloat16, {begins.back(), 1, size});
  a.k = memory.tensor(bfloat16, {batch, capacity, 1, size});
  a.v = memory.tensor(bfloat16, {batch, capacity, 1, size});
  for (const Tensor& input : {a.q, a.k, a.v}) testing::fill(input, [] { return 0.0; });
  for (const Tensor& input : {a.k_new, a.v_new}) {
    testing::fill(input, [count = 0]() mutable { return 1 + count++ / size; });
  }
  a.cu_seqlens_k_new = memory.integers(begins);
  a.seqused_k = memory.integers(std::vector<std::int64_t>(batch, 1));
  a.out = memory.tensor(bfloat16, {batch, 1, 1, size});
  move_to_gpu(a);
  attention(a);
  for (std::int64_t b = 0; b < batch; ++b) {
    for (std::int64_t row = 0; row < capacity; ++row) {
      const bool is_new = row >= 1 && row <= begins[b + 1] - begins[b];
      for (std::int64_t i = 0; i < size; ++i) {
        for (const Tensor& cache : {a.k, a.v}) {
          EXPECT_EQ(testing::read(cache, b, row, 0, i), is_new ? begins[b] + row : 0) << b << ", " << row;
        }
      }
    }
  }
}

TEST_F(EmulatedGpu, MatchesTheReference) { judge_calls(testing::RandomCall::Kind::any, 60); }

TEST_F(EmulatedGpu, MatchesTheReferenceInPlainCalls) { judge_calls(testing::RandomCall::Kind::plain, 30); }

TEST_F(EmulatedGpu, MatchesTheReferenceInPrompts) { judge_calls(testing::RandomCall::Kind::prompts, 16); }

TEST_F(EmulatedGpu, MatchesTheReferenceInFewTiles) { judge_calls(testing::RandomCall::Kind::few_tiles, 16); }

TEST_F(EmulatedGpu, MatchesTheReferenceInWideHeads) { judge_calls(testing::RandomCall::Kind::wide, 16); }

/// Sequences of all kinds, and of prompts beside few queries.
TEST_F(EmulatedGpu, IsBatchInvariantWhereAsked) {
  for (const auto kind : {testing::RandomCall::Kind::any, testing::RandomCall::Kind::mixed}) {
    for_random_calls(kind, 20, [](testing::RandomCall& call) {
      AttentionArguments& a = call.arguments;
      if (a.rotary_cos.given()) return std::string();  // its queries are not those of the call below
      a.batch_invariant = true;
      attention(a);
      for (const testing::CallSequence& s : testing::sequences_of(a)) {
        testing::Memory memory;
        AttentionArguments alone = testing::call_of_one(memory, a, s);
        move_to_gpu(alone);
        attention(alone);
        if (testing::result_bits(a, s) != testing::result_bits(alone, testing::sequence_alone(s))) {
          return "other bits of sequence " + std::to_string(s.b);
        }
      }
      return std::string();
    });
  }
}

TEST_F(EmulatedGpu, ServesPromptsAndDecodedTokens) { judge_calls(testing::RandomCall::Kind::mixed, 20); }

}  // namespace
}  // namespace mate
