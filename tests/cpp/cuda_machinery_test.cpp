// The host side of the CUDA backend: driver, compiler, kernel cache and, where there is a GPU, launches.
#include <gtest/gtest.h>
#include <mate/error.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include <array>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <map>
#include <optional>
#include <set>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "cuda/compiler.h"
#include "cuda/counters.h"
#include "cuda/device.h"
#include "cuda/driver.h"
#include "cuda/kernel_cache.h"
#include "cuda/kernel_library.h"
#include "cuda/sha256.h"
#include "cuda/sources.h"
#include "cuda/tensor_map.h"
#include "cuda/variants.h"
#include "nvrtc.h"

namespace mate::cuda {
namespace {

namespace fs = std::filesystem;
using ::testing::TempDir;

/// A kernel that sets an int.
KernelSource tiny_kernel(const std::string& name, int value = 1) {
  return {name, "extern \"C\" __global__ void " + name + "(int* p) { *p = " + std::to_string(value) + "; }\n", 0};
}

class Compiler : public ::testing::Test {
 protected:
  void SetUp() override {
    look_in_python_packages();
    if (const std::string reason = why_no_compiler(); !reason.empty()) GTEST_SKIP() << reason;
  }
};

TEST_F(Compiler, MakesACubinAndTellsOfRegisters) {
  const Compilation compilation = compile(tiny_kernel("sets_one"));
  EXPECT_EQ(compilation.cubin.substr(1, 3), "ELF");
  EXPECT_NE(compilation.log.find("registers"), std::string::npos) << compilation.log;
  EXPECT_GT(compilation.seconds, 0);
}

TEST_F(Compiler, GivesTheLogOfABrokenSource) {
  try {
    compile({"broken", "extern \"C\" __global__ void broken() { no_such_function(); }\n", 0});
    FAIL() << "it compiled";
  } catch (const std::runtime_error& error) {
    EXPECT_NE(std::string(error.what()).find("no_such_function"), std::string::npos) << error.what();
    EXPECT_NE(std::string(error.what()).find("broken.cu"), std::string::npos) << error.what();
  }
}

TEST_F(Compiler, TakesEachEmbeddedHeaderAlone) {
  std::set<std::string> names;
  for (const EmbeddedHeader& header : embedded_headers()) {
    names.insert(header.name);
    const std::string text = std::string("#include \"") + header.name + "\"\nextern \"C\" __global__ void alone() {}\n";
    try {
      const Compilation compilation = compile({"alone", text, 0});
      EXPECT_EQ(compilation.log.find("warning"), std::string::npos) << header.name << "\n" << compilation.log;
    } catch (const std::runtime_error& error) {
      ADD_FAILURE() << header.name << ": " << error.what();
    }
  }
  for (const char* name : {"attention/visibility.h", "tensor_map.h", "ptx/tma.h"}) EXPECT_TRUE(names.contains(name));
}

TEST_F(Compiler, CompilesInSeveralThreads) {
  std::array<std::string, 4> cubins;
  std::vector<std::thread> threads;
  for (std::string& cubin : cubins) {
    threads.emplace_back([&] { cubin = compile(tiny_kernel("in_a_thread")).cubin; });
  }
  for (std::thread& thread : threads) thread.join();
  for (const std::string& cubin : cubins) EXPECT_EQ(cubin, cubins[0]);
}

// The compiler is chosen once in a process, so that each choice needs a process of its own.
class CompilerChoice : public ::testing::Test {
 protected:
  void SetUp() override { GTEST_FLAG_SET(death_test_style, "threadsafe"); }

  /// Ends the process with what happened.
  [[noreturn]] static void choose(const char* variable) {
    setenv("MATE_NVRTC", variable, 1);
    std::fputs((why_no_compiler() + "\n").c_str(), stderr);
    std::exit(why_no_compiler().empty() ? 0 : 1);
  }
};

TEST_F(CompilerChoice, TakesWhatTheVariableNames) {
  const std::string library = MATE_SITE_PACKAGES "/nvidia/cu13/lib/libnvrtc.so.13";
  if (!fs::exists(library)) GTEST_SKIP() << "there is no " << library;
  EXPECT_EXIT(choose(library.c_str()), ::testing::ExitedWithCode(0), "");
}

TEST_F(CompilerChoice, TakesNothingElseThen) {
  EXPECT_EXIT(choose("/no/such/libnvrtc.so"), ::testing::ExitedWithCode(1), "MATE_NVRTC: /no/such/libnvrtc.so");
}

TEST_F(CompilerChoice, RefusesALibraryThatIsNone) {
  EXPECT_EXIT(choose("libc.so.6"), ::testing::ExitedWithCode(1), "nvrtc");
}

/// Each test has a folder of its own, which is not there yet, as MATE_CACHE_DIR.
class KernelCache : public Compiler {
 protected:
  void SetUp() override {
    Compiler::SetUp();
    std::string pattern = TempDir() + "mate_cache_XXXXXX";
    parent_ = mkdtemp(pattern.data());
    use(parent_ / "kernels");
  }
  void TearDown() override {
    unsetenv("MATE_CACHE_DIR");
    if (!parent_.empty()) fs::remove_all(parent_);
  }

  void use(const fs::path& folder) {
    folder_ = folder;
    setenv("MATE_CACHE_DIR", folder.c_str(), 1);
  }

  std::vector<fs::path> files() const { return {fs::directory_iterator(folder_), fs::directory_iterator()}; }

  fs::path only_file() const {
    EXPECT_EQ(files().size(), 1U);
    return files().at(0);
  }

  void expect_refused() {
    try {
      cached_kernel(tiny_kernel("refused"));
      ADD_FAILURE() << "the folder was used";
    } catch (const Error& error) {
      EXPECT_EQ(static_cast<int>(error.kind()), static_cast<int>(ErrorKind::value));
      EXPECT_NE(std::string(error.what()).find(folder_), std::string::npos) << error.what();
      EXPECT_NE(std::string(error.what()).find("MATE_CACHE_DIR"), std::string::npos) << error.what();
    }
    EXPECT_TRUE(files().empty());
  }

  fs::path parent_;
  fs::path folder_;
};

std::string content_of(const fs::path& file) {
  std::ifstream stream(file, std::ios::binary);
  return {std::istreambuf_iterator<char>(stream), {}};
}

void write(const fs::path& file, const std::string& content) {
  std::ofstream(file, std::ios::binary | std::ios::trunc) << content;
}

TEST_F(KernelCache, GivesBackWhatItCompiled) {
  const CachedKernel first = cached_kernel(tiny_kernel("kept"));
  const CachedKernel second = cached_kernel(tiny_kernel("kept"));
  EXPECT_TRUE(first.compiled);
  EXPECT_FALSE(second.compiled);
  EXPECT_EQ(first.cubin, second.cubin);
  only_file();
}

TEST_F(KernelCache, IsPrivate) {
  cached_kernel(tiny_kernel("kept"));
  EXPECT_EQ(fs::status(folder_).permissions(), fs::perms::owner_all);
  EXPECT_EQ(fs::status(only_file()).permissions(), fs::perms::owner_read | fs::perms::owner_write);
}

TEST_F(KernelCache, KeepsSourcesOfOneNameApart) {
  EXPECT_TRUE(cached_kernel(tiny_kernel("kept", 1)).compiled);
  EXPECT_TRUE(cached_kernel(tiny_kernel("kept", 2)).compiled);
  EXPECT_FALSE(cached_kernel(tiny_kernel("kept", 1)).compiled);
  EXPECT_EQ(files().size(), 2U);
}

TEST_F(KernelCache, CompilesAgainWhatIsDamaged) {
  const std::string cubin = cached_kernel(tiny_kernel("kept")).cubin;
  const fs::path file = only_file();
  const std::string whole = content_of(file);
  std::vector<std::string> damaged = {
      "",           whole.substr(0, 10),           whole.substr(0, whole.size() / 2), whole.substr(0, whole.size() - 1),
      whole + "\n", std::string(whole.size(), 'x')};
  for (const std::size_t at : {std::size_t{0}, std::size_t{30}, whole.size() - 1}) {
    damaged.push_back(whole);
    damaged.back()[at] ^= 1;
  }
  for (const std::string& content : damaged) {
    write(file, content);
    const CachedKernel again = cached_kernel(tiny_kernel("kept"));
    EXPECT_TRUE(again.compiled) << content.size() << " of " << whole.size() << " bytes";
    EXPECT_EQ(again.cubin, cubin);
    EXPECT_EQ(content_of(only_file()), whole);
  }
}

TEST_F(KernelCache, CompilesAgainWhatIsOfAnotherSource) {
  cached_kernel(tiny_kernel("kept", 1));
  const fs::path file = only_file();
  const std::string whole = content_of(file);
  fs::remove(file);
  cached_kernel(tiny_kernel("kept", 2));
  const std::string cubin = cached_kernel(tiny_kernel("kept", 2)).cubin;
  write(only_file(), whole);
  const CachedKernel again = cached_kernel(tiny_kernel("kept", 2));
  EXPECT_TRUE(again.compiled);
  EXPECT_EQ(again.cubin, cubin);
}

TEST_F(KernelCache, CompilesAgainWhatOthersMayHaveWritten) {
  cached_kernel(tiny_kernel("kept"));
  fs::permissions(only_file(), fs::perms::all);
  EXPECT_TRUE(cached_kernel(tiny_kernel("kept")).compiled);
  EXPECT_FALSE(cached_kernel(tiny_kernel("kept")).compiled);
}

TEST_F(KernelCache, RefusesAFolderThatOthersMayWriteTo) {
  fs::create_directory(folder_);
  for (const fs::perms others : {fs::perms::group_write, fs::perms::others_write}) {
    fs::permissions(folder_, fs::perms::owner_all | others);
    expect_refused();
  }
}

TEST_F(KernelCache, RefusesAFolderOfAnotherUser) {
  fs::create_directory(folder_);
  fs::permissions(folder_, fs::perms::owner_all);
  if (chown(folder_.c_str(), geteuid() + 1, -1) != 0) GTEST_SKIP() << "only root can give a folder away";
  expect_refused();
}

TEST_F(KernelCache, ServesTheProcessAloneWhereThereCanBeNoFolder) {
  write(parent_ / "file", "");
  use(parent_ / "file" / "kernels");
  const CachedKernel first = cached_kernel(tiny_kernel("unkept"));
  const CachedKernel second = cached_kernel(tiny_kernel("unkept"));
  EXPECT_TRUE(first.compiled);
  EXPECT_FALSE(second.compiled);
  EXPECT_EQ(first.cubin, second.cubin);
}

TEST_F(KernelCache, LiesWhereTheEnvironmentSays) {
  unsetenv("MATE_CACHE_DIR");
  const auto with = [](const char* variable, const char* value, const std::string& expected) {
    const char* const before = std::getenv(variable);
    const std::string kept = before == nullptr ? "" : before;
    setenv(variable, value, 1);
    EXPECT_NE(describe_cache().find(expected), std::string::npos) << describe_cache();
    before == nullptr ? unsetenv(variable) : setenv(variable, kept.c_str(), 1);
  };
  with("MATE_CACHE_DIR", "/some/folder", "\"/some/folder\"");
  with("XDG_CACHE_HOME", "/some/caches", "\"/some/caches/mate\"");
  setenv("XDG_CACHE_HOME", "relative", 1);  // the XDG specification has such paths ignored
  with("HOME", "/some/home", "\"/some/home/.cache/mate\"");
  unsetenv("XDG_CACHE_HOME");
}

TEST_F(KernelCache, SaysWhatItDoes) {
  setenv("MATE_LOG", "compile", 1);
  ::testing::internal::CaptureStderr();
  cached_kernel(tiny_kernel("told"));
  cached_kernel(tiny_kernel("told"));
  const std::string text = ::testing::internal::GetCapturedStderr();
  unsetenv("MATE_LOG");
  EXPECT_NE(text.find("mate: compiled told in "), std::string::npos) << text;
  EXPECT_NE(text.find("mate: read told from " + folder_.native()), std::string::npos) << text;
}

TEST_F(KernelCache, IsSharedByProcesses) {
  std::vector<pid_t> processes;
  for (int i = 0; i < 6; ++i) {
    const pid_t process = fork();
    if (process == 0) {
      const std::string cubin = cached_kernel(tiny_kernel("shared")).cubin;
      _exit(cubin == cached_kernel(tiny_kernel("shared")).cubin ? 0 : 1);
    }
    processes.push_back(process);
  }
  for (const pid_t process : processes) {
    int status = -1;
    waitpid(process, &status, 0);
    EXPECT_EQ(status, 0);
  }
  EXPECT_FALSE(cached_kernel(tiny_kernel("shared")).compiled);
  only_file();
}

TEST_F(KernelCache, IsSharedByThreads) {
  std::vector<std::thread> threads;
  std::atomic<int> wrong = 0;
  for (int i = 0; i < 6; ++i) {
    threads.emplace_back([&, name = "thread" + std::to_string(i % 2)] {
      const std::string cubin = cached_kernel(tiny_kernel(name)).cubin;
      if (cubin != cached_kernel(tiny_kernel(name)).cubin) ++wrong;
    });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(wrong, 0);
  EXPECT_EQ(files().size(), 2U);
}

TEST(Sha256, OfTheStandardsExamples) {
  EXPECT_EQ(to_hex(sha256("")), "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855");
  EXPECT_EQ(to_hex(sha256("abc")), "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad");
  EXPECT_EQ(to_hex(sha256("abcdbcdecdefdefgefghfghighijhijkijkljklmklmnlmnomnopnopq")),
            "248d6a61d20638b8e5c026930c3e6039a33ce45964ff2167f6ecedd419db06c1");
  EXPECT_EQ(to_hex(sha256(std::string(1000000, 'a'))),
            "cdc76e5c9914fb9281a1c7e284d73e67f1809a48a497200e046d39ccc7112cd0");
}

TEST(DriverOfThisMachine, IsThereOrItIsSaidWhyNot) {
  if (find_driver() != nullptr) {
    EXPECT_EQ(why_no_driver(), "");
    return;
  }
  EXPECT_NE(why_no_driver(), "");
  EXPECT_NE(describe().find(why_no_driver()), std::string::npos) << describe();
  try {
    device(0);
    FAIL() << "there is a device without a driver";
  } catch (const Error& error) {
    EXPECT_EQ(static_cast<int>(error.kind()), static_cast<int>(ErrorKind::not_implemented));
    EXPECT_NE(std::string(error.what()).find("cuda:0"), std::string::npos) << error.what();
    EXPECT_NE(std::string(error.what()).find(why_no_driver()), std::string::npos) << error.what();
  }
}

TEST(TensorMaps, AreRefusedForWhatTheCopyEngineCannotRead) {
  alignas(16) const char memory[32] = {};
  const auto encodes = [](const void* data, std::uint64_t rows, std::uint64_t row_bytes) {
    TensorMap map;
    return encode_tensor_map(map, 2, data, std::array<std::uint64_t, 2>{64, rows}, std::array{row_bytes},
                             std::array{64U, 8U});
  };
  constexpr std::uint64_t most_bytes = std::uint64_t{1} << 40;
  EXPECT_FALSE(encodes(memory + 2, 8, 128)) << "address";
  EXPECT_FALSE(encodes(memory, 8, 130)) << "stride";
  EXPECT_FALSE(encodes(memory, 8, most_bytes)) << "stride";
  EXPECT_FALSE(encodes(memory, 8, -std::uint64_t{128})) << "negative stride";
  EXPECT_FALSE(encodes(memory, 0, 128)) << "extent";
  EXPECT_FALSE(encodes(memory, most_bytes, 128)) << "extent";
}

/// What these tests call of the driver beyond what MATE does.
struct MoreOfTheDriver {
  void* library = driver().library;
  DriverFunction<CUresult(void* to, CUdeviceptr from, std::size_t bytes, CUstream stream)> cuMemcpyDtoHAsync{
      library, "cuMemcpyDtoHAsync_v2"};
  DriverFunction<CUresult(CUstream stream, int mode)> cuStreamBeginCapture{library, "cuStreamBeginCapture_v2"};
  DriverFunction<CUresult(CUstream stream, void** graph)> cuStreamEndCapture{library, "cuStreamEndCapture"};
  DriverFunction<CUresult(void** executable, void* graph, unsigned long long flags)> cuGraphInstantiateWithFlags{
      library, "cuGraphInstantiateWithFlags"};
  DriverFunction<CUresult(void* executable, CUstream stream)> cuGraphLaunch{library, "cuGraphLaunch"};
};

/// A context of the first device is current, and there is a stream.
class Gpu : public KernelCache {
 protected:
  void SetUp() override {
    if (find_driver() == nullptr) GTEST_SKIP() << why_no_driver();
    if (device(0).capability != 90) GTEST_SKIP() << device(0).name << " is no Hopper";
    KernelCache::SetUp();
    context_.emplace(device(0));
    more_.emplace();
    stream_ = make_stream();
  }

  static CUstream make_stream() {
    CUstream stream = nullptr;
    driver().cuStreamCreate(&stream, CU_STREAM_NON_BLOCKING);
    return stream;
  }

  void set(int* address, int value) {
    const Kernel kernel = kernels_.load(device(0), value, [&] { return tiny_kernel("sets_an_int", value); });
    launch(kernel, {.grid = {}, .block = {}, .stream = stream_}, address);
  }

  int read(const int* address) {
    int value = -1;
    more_->cuMemcpyDtoHAsync(&value, reinterpret_cast<CUdeviceptr>(address), sizeof value, stream_);
    driver().cuStreamSynchronize(stream_);
    return value;
  }

  std::optional<CurrentContext> context_;
  std::optional<MoreOfTheDriver> more_;
  CUstream stream_ = nullptr;
  KernelFamily kernels_;
};

TEST_F(Gpu, RunsAKernel) {
  int* const memory = counters(stream_);
  for (const int value : {5, 6, 5, 0}) {
    set(memory, value);
    EXPECT_EQ(read(memory), value);
  }
}

TEST_F(Gpu, RunsAKernelThatIsFirstNeededInACapture) {
  constexpr int strictest_mode = 0;  // CU_STREAM_CAPTURE_MODE_GLOBAL
  more_->cuStreamBeginCapture(stream_, strictest_mode);
  int* const memory = counters(stream_);
  set(memory, 5);
  void* graph = nullptr;
  more_->cuStreamEndCapture(stream_, &graph);
  EXPECT_EQ(read(memory), 0);
  void* executable = nullptr;
  more_->cuGraphInstantiateWithFlags(&executable, graph, 0);
  more_->cuGraphLaunch(executable, stream_);
  EXPECT_EQ(read(memory), 5);
}

TEST_F(Gpu, GivesEachStreamAndEachCapturedLaunchItsCounters) {
  int* const first = counters(stream_);
  EXPECT_EQ(counters(stream_), first);
  std::set<int*> all = {first, counters(make_stream()), counters(nullptr)};
  more_->cuStreamBeginCapture(stream_, 0);
  for (int i = 0; i < 5000; ++i) all.insert(counters(stream_));
  void* graph = nullptr;
  more_->cuStreamEndCapture(stream_, &graph);
  EXPECT_EQ(all.size(), 5003U);
  EXPECT_EQ(counters(stream_), first);
  for (const int* one : all) {
    for (const int i : {0, counters_of_call - 1}) ASSERT_EQ(read(one + i), 0);
  }
}

TEST_F(Gpu, LoadsAKernelOnceForManyThreads) {
  std::vector<std::thread> threads;
  std::array<CUkernel, 8> handles;
  for (CUkernel& handle : handles) {
    threads.emplace_back([&] {
      const CurrentContext context(device(0));
      handle = kernels_.load(device(0), 1, [] { return tiny_kernel("wanted_by_many"); }).handle;
    });
  }
  for (std::thread& thread : threads) thread.join();
  for (const CUkernel handle : handles) EXPECT_EQ(handle, handles[0]);
}

TEST_F(Gpu, DescribesATensorToTheCopyEngine) {
  TensorMap map;
  const std::array<std::uint64_t, 3> dims = {64, 8, 3};
  const auto encodes = [&](std::uint64_t slot_bytes) {
    return encode_tensor_map(map, 2, counters(stream_), dims, std::array<std::uint64_t, 2>{128, slot_bytes},
                             std::array{64U, 8U, 1U});
  };
  EXPECT_TRUE(encodes(1024));
  EXPECT_TRUE(encodes(0)) << "slots that are one";
}

TEST_F(Gpu, SaysWhatTheDriverRefuses) {
  try {
    kernels_.load(device(0), 1, [] { return KernelSource{"absent", tiny_kernel("present").text, 0}; });
    FAIL() << "there is no such kernel";
  } catch (const DriverError& error) {
    EXPECT_NE(std::string(error.what()).find("cuLibraryGetKernel"), std::string::npos) << error.what();
    EXPECT_NE(std::string(error.what()).find("CUDA_ERROR_NOT_FOUND"), std::string::npos) << error.what();
  }
}

TEST(Variants, HaveKeysOfTheirOwn) {
  constexpr ElementType f16 = ElementType::float16;
  constexpr ElementType bf16 = ElementType::bfloat16;
  constexpr ElementType e4m3 = ElementType::float8_e4m3;
  const std::vector<TensorTypes> types = {{bf16, bf16, bf16}, {f16, f16, f16},    {e4m3, e4m3, bf16},
                                          {e4m3, e4m3, f16},  {bf16, e4m3, bf16}, {f16, e4m3, f16}};
  std::map<std::uint64_t, std::string> programs;
  for (const TensorTypes& of_call : types) {
    for (const int head_dim : {16, 72, 128, 192, 256, 272, 512}) {
      for (const int head_dim_v : {16, 64, 128, 256, 320, 512}) {
        for (int flags = 0; flags < 4096; ++flags) {
          VariantChoice choice{head_dim, head_dim_v, of_call};
          choice.scores = (flags & 1) == 0 ? Scores::products : (flags & 256) == 0 ? Scores::capped : Scores::scaled;
          choice.gather = (flags & 2) != 0;
          choice.splits = (flags & 4) != 0;
          choice.few_rows = (flags & 8) != 0;
          choice.narrow = (flags & 16) != 0;
          choice.alike = (flags & 32) != 0;
          choice.qv = (flags & 64) != 0;
          choice.plain = (flags & 128) != 0;
          choice.clusters = (flags & 512) != 0;
          choice.merges_in_cluster = (flags & 1024) != 0;
          choice.low_tiles = (flags & 2048) != 0;
          for (const int rows : {8, 16, 32, 64}) {
            choice.transposed_rows = transposed_rows_for(rows);
            choice.stream_rows =
                choice.few_rows && choice.splits ? stream_rows_for(of_call, head_dim, head_dim_v, rows) : 0;
            const ForwardVariant variant = choose_variant(choice);
            EXPECT_TRUE(!variant.merges_in_cluster || variant.has_room_for_part()) << source_of(variant).name;
            const std::string program = source_of(variant).text;
            const auto [known, is_new] = programs.emplace(key_of(variant), program);
            ASSERT_EQ(known->second, program);
          }
        }
      }
    }
  }
  EXPECT_GT(programs.size(), 1000);
}

}  // namespace
}  // namespace mate::cuda
