// Kernels are compiled as they are on a machine with a GPU, and what the compiler says of them is read: none may spill
// registers, use a stack, or lose what its schedule rests on.
#include <gtest/gtest.h>

#include <atomic>
#include <exception>
#include <mutex>
#include <set>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "attention/check.h"
#include "cuda/compile_log.h"
#include "cuda/compiler.h"
#include "cuda/variants.h"
#include "nvrtc.h"

namespace mate::cuda {
namespace {

class CudaKernels : public ::testing::Test {
 protected:
  void SetUp() override {
    look_in_python_packages();
    if (const std::string reason = why_no_compiler(); !reason.empty()) GTEST_SKIP() << reason;
  }
};

CompileLog log_of(const std::string& name, const std::string& text) {
  return read_log(compile({.name = name, .text = text}).log);
}

TEST_F(CudaKernels, SpillsAreSeen) {
  const CompileLog log = log_of("spills", R"(
      extern "C" __global__ void __launch_bounds__(1024, 2) spills(float* p) {
        float a[100];
        for (int i = 0; i < 100; ++i) a[i] = p[i * threadIdx.x];
        for (int round = 0; round < 5; ++round) {
          for (int i = 0; i < 100; ++i) a[i] = a[i] * a[(i * 7 + 3) % 100] + p[round];
        }
        for (int i = 0; i < 100; ++i) p[i] = a[i];
      })");
  EXPECT_GT(log.spill_bytes, 0);
  EXPECT_GT(log.stack_bytes, 0);
  EXPECT_FALSE(log.is_clean());
}

TEST_F(CudaKernels, AStackIsSeen) {
  const CompileLog log = log_of("stack", R"(
      extern "C" __global__ void stack(int* p) {
        volatile int a[10];
        for (int i = 0; i < 10; ++i) a[p[i]] = i;
        *p = a[*p];
      })");
  EXPECT_GE(log.stack_bytes, 40);
  EXPECT_FALSE(log.is_clean());
}

TEST_F(CudaKernels, IgnoredRegistersAreSeen) {
  const CompileLog log = log_of("ignored", R"(
      #include "forward.h"
      extern "C" __global__ void ignored(int* p) {  // without __launch_bounds__
        mate::cuda::ptx::set_registers<160, 64>();
        *p = 1;
      })");
  ASSERT_EQ(log.warnings.size(), 1);
  EXPECT_NE(log.warnings[0].find("setmaxnreg"), std::string::npos) << log.warnings[0];
  EXPECT_FALSE(log.is_clean());
}

TEST_F(CudaKernels, ProductsThatWaitForEachOtherAreSeen) {
  const CompileLog log = log_of("serial", R"(
      #include "ptx/wgmma.h"
      using namespace mate::cuda;
      extern "C" __global__ void __launch_bounds__(128) serial(float* p, unsigned a) {
        float d[8] = {};
        for (unsigned i = 0; i < a; ++i) {
          ptx::wgmma_fence();
          ptx::wgmma<mate::ElementType::bfloat16, 16>(d, a, a + i, 1);
          d[0] += 1;  // before the product has been waited for
          ptx::wgmma_commit();
        }
        p[threadIdx.x] = d[0] + d[1];
      })");
  ASSERT_FALSE(log.warnings.empty());
  EXPECT_NE(log.warnings[0].find("wgmma"), std::string::npos) << log.warnings[0];
}

TEST(CudaCompileLog, MustTellOfRegisters) { EXPECT_THROW(read_log("nothing"), std::runtime_error); }

TEST_F(CudaKernels, RunAsTheirScheduleSays) {
  struct Model {
    int head_dim;
    int head_dim_v;
    TensorTypes types = {};
    bool softcap = false;
    bool qv = false;
    bool plain_too = true;  // plain kernels are less of the same code: some models' are left out, to spare time
  };
  constexpr ElementType f16 = ElementType::float16;
  constexpr ElementType e4m3 = ElementType::float8_e4m3;
  constexpr TensorTypes bf16s;
  constexpr TensorTypes fp16s{f16, f16, f16};
  constexpr TensorTypes e4m3s{e4m3, e4m3};
  constexpr TensorTypes over_e4m3{.key = e4m3};
  const std::vector<Model> models = {{64, 64},
                                     {128, 128},
                                     {256, 256},
                                     {192, 128, bf16s, false, false, false},
                                     {72, 40, fp16s, false, false, false},
                                     {64, 64, fp16s, true, false, false},
                                     {256, 256, fp16s, true, false, false},
                                     {320, 320, bf16s, false, false, false},
                                     {320, 64, bf16s, false, false, false},
                                     {512, 512},
                                     {64, 512, bf16s, false, true},
                                     {512, 512, fp16s, true, true, false},
                                     {64, 64, bf16s, true, true, false},
                                     {64, 64, e4m3s, false, false, false},
                                     {128, 128, e4m3s},
                                     {256, 256, e4m3s},
                                     {256, 256, over_e4m3, true, false, false},
                                     {64, 512, over_e4m3, false, true},
                                     {512, 512, e4m3s, true, true, false}};
  std::vector<KernelSource> sources;
  std::set<std::string> names;
  for (const Model& model : models) {
    for (const KernelSource& source :
         kernels_for(model.head_dim, model.head_dim_v, model.types, model.softcap, model.qv)) {
      if (source.name.ends_with("_plain") && !model.plain_too) continue;
      if (names.insert(source.name).second) sources.push_back(source);
    }
  }
  std::atomic<std::size_t> next = 0;
  std::mutex mutex;
  std::string defects;
  const auto work = [&] {
    for (std::size_t i = next++; i < sources.size(); i = next++) {
      std::string found;
      try {
        const CompileLog log = read_log(compile(sources[i]).log);
        if (log.spill_bytes > 0) found += join(" spills ", log.spill_bytes, " bytes;");
        if (log.stack_bytes > 0) found += join(" has a stack of ", log.stack_bytes, " bytes;");
        for (const std::string& warning : log.warnings) found += " " + warning;
      } catch (const std::exception& error) {
        found = error.what();
      }
      const std::lock_guard lock(mutex);
      if (!found.empty()) defects += sources[i].name + ":" + found + "\n";
    }
  };
  std::vector<std::thread> threads(std::thread::hardware_concurrency());
  for (std::thread& thread : threads) thread = std::thread(work);
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(defects, "");
}

}  // namespace
}  // namespace mate::cuda
