#include "compiler.h"

#include <dlfcn.h>
#include <link.h>

#include <array>
#include <chrono>
#include <compare>
#include <cstddef>
#include <cstdlib>
#include <filesystem>
#include <memory>
#include <mutex>
#include <optional>
#include <ostream>
#include <stdexcept>
#include <utility>

#include "attention/check.h"
#include "driver.h"
#include "dynamic_library.h"
#include "sources.h"

namespace mate::cuda {
namespace {

namespace fs = std::filesystem;

constexpr std::array options = {
    "--gpu-architecture=sm_90a",
    "--std=c++20",
    "--device-as-default-execution-space",  // headers that the host shares do not speak of devices
    "--fmad=false",        // products and sums are fused where the code says so, or bits would depend on the variant
    "--ptxas-options=-v",  // the log tells of registers and spills
};

struct CudaVersion {
  int major = 0;
  int minor = 0;

  auto operator<=>(const CudaVersion&) const = default;
};

std::ostream& operator<<(std::ostream& text, const CudaVersion& version) {
  return text << version.major << "." << version.minor;
}

constexpr CudaVersion oldest_version{12, 4};
/// Libraries are named after these. The first that serves is taken.
constexpr std::array cuda_majors = {13, 12};

using nvrtcProgram = struct _nvrtcProgram*;
constexpr int NVRTC_SUCCESS = 0;

/// The functions of NVRTC that MATE calls, as nvrtc.h declares them.
struct Nvrtc {
  void* library;

  const char* (*nvrtcGetErrorString)(int result) = find("nvrtcGetErrorString");
  int (*nvrtcVersion)(int* major, int* minor) = find("nvrtcVersion");
  int (*nvrtcCreateProgram)(nvrtcProgram* program, const char* text, const char* name, int header_count,
                            const char* const* header_texts,
                            const char* const* header_names) = find("nvrtcCreateProgram");
  int (*nvrtcDestroyProgram)(nvrtcProgram* program) = find("nvrtcDestroyProgram");
  int (*nvrtcCompileProgram)(nvrtcProgram program, int option_count,
                             const char* const* options) = find("nvrtcCompileProgram");
  int (*nvrtcGetProgramLogSize)(nvrtcProgram program, std::size_t* size) = find("nvrtcGetProgramLogSize");
  int (*nvrtcGetProgramLog)(nvrtcProgram program, char* log) = find("nvrtcGetProgramLog");
  int (*nvrtcGetCUBINSize)(nvrtcProgram program, std::size_t* size) = find("nvrtcGetCUBINSize");
  int (*nvrtcGetCUBIN)(nvrtcProgram program, char* cubin) = find("nvrtcGetCUBIN");

  LibraryFunction find(const char* name) const { return {library, name}; }

  void check(int result) const {
    if (result != NVRTC_SUCCESS) throw std::runtime_error(join("NVRTC failed: ", nvrtcGetErrorString(result)));
  }

  CudaVersion version() const {
    CudaVersion version;
    check(nvrtcVersion(&version.major, &version.minor));
    return version;
  }

  fs::path path() const {
    link_map* map = nullptr;
    return dlinfo(library, RTLD_DI_LINKMAP, &map) == 0 ? map->l_name : "libnvrtc.so";
  }
};

void* open_library(const fs::path& path, int flags = 0) { return dlopen(path.c_str(), RTLD_LAZY | RTLD_LOCAL | flags); }

/// The CUDA release of the driver; nothing where there is no driver.
std::optional<int> driver_major() {
  if (find_driver() == nullptr) return std::nullopt;
  int version = 0;
  driver().cuDriverGetVersion(&version);
  return version / 1000;
}

/// The compiler in an open library. Throws std::runtime_error where it does not serve.
Nvrtc make_nvrtc(void* library) {
  const Nvrtc nvrtc{library};
  const std::string path = nvrtc.path().native();
  const CudaVersion version = nvrtc.version();
  if (version < oldest_version) {
    throw std::runtime_error(join(path, " is of CUDA ", version, ", older than ", oldest_version));
  }
  if (const std::optional<int> newest = driver_major(); newest && version.major > *newest) {
    throw std::runtime_error(join(path, " is of CUDA ", version, ", too new for a driver of CUDA ", *newest));
  }
  // NVRTC opens this one by its name alone, and no run path leads to it: a library that is open already is found.
  const std::string builtins = join("libnvrtc-builtins.so.", version);
  if (open_library(nvrtc.path().parent_path() / builtins) == nullptr && open_library(builtins) == nullptr) {
    throw std::runtime_error(join(path, " lacks ", builtins, " beside it"));
  }
  return nvrtc;
}

/// Opens NVRTC wherever it may be, the best place first, until `take(library)` is true.
template <typename Take>
void try_libraries(const std::vector<fs::path>& python_folders, const Take& take) {
  const auto try_folder = [&](const fs::path& folder, int flags = 0) {
    for (const int major : cuda_majors) {
      void* const library = open_library(folder / join("libnvrtc.so.", major), flags);
      if (library != nullptr && take(library)) return true;
    }
    return false;
  };
  const fs::path anywhere;  // a name without a folder is looked for by the loader
  if (try_folder(anywhere, RTLD_NOLOAD)) return;
  for (const fs::path& folder : python_folders) {
    if (try_folder(folder)) return;
  }
  if (try_folder(anywhere)) return;
  for (const char* const variable : {"CUDA_HOME", "CUDA_PATH"}) {
    const char* const toolkit = std::getenv(variable);
    if (toolkit != nullptr && try_folder(fs::path(toolkit) / "lib64")) return;
  }
  try_folder("/usr/local/cuda/lib64");
}

Nvrtc look_for_nvrtc(const std::vector<fs::path>& python_folders) {
  if (const char* const path = std::getenv("MATE_NVRTC"); path != nullptr && *path != '\0') {
    void* const library = open_library(path);
    if (library == nullptr) fail(ErrorKind::value, "MATE_NVRTC: ", dlerror());
    return make_nvrtc(library);
  }
  std::optional<Nvrtc> found;
  std::string refused;
  try_libraries(python_folders, [&](void* library) {
    try {
      found = make_nvrtc(library);
    } catch (const std::runtime_error& error) {
      refused += join("; ", error.what());
    }
    return found.has_value();
  });
  if (found) return *found;
  const bool of_cuda_12 = driver_major() == 12;
  throw std::runtime_error(join("MATE compiles its GPU kernels with NVRTC of CUDA ", oldest_version,
                                " or newer, which is not found", refused, ": pip install ",
                                of_cuda_12 ? "'nvidia-cuda-nvrtc-cu12>=12.4'" : "'nvidia-cuda-nvrtc==13.*'",
                                ", or set MATE_NVRTC to the path of its libnvrtc.so"));
}

/// The compiler once it is found, and where else to look for it.
struct Choice {
  std::mutex mutex;
  std::vector<fs::path> python_folders;
  std::optional<Nvrtc> nvrtc;
};

Choice& choice() {
  static Choice choice;
  return choice;
}

const Nvrtc& nvrtc() {
  const std::lock_guard lock(choice().mutex);
  if (!choice().nvrtc) choice().nvrtc = look_for_nvrtc(choice().python_folders);
  return *choice().nvrtc;
}

}  // namespace

Compilation compile(const KernelSource& source) {
  const Nvrtc& compiler = nvrtc();
  const auto start = std::chrono::steady_clock::now();
  std::vector<const char*> header_names;
  std::vector<const char*> header_texts;
  for (const EmbeddedHeader& header : embedded_headers()) {
    header_names.push_back(header.name);
    header_texts.push_back(header.text);
  }
  nvrtcProgram program = nullptr;
  compiler.check(compiler.nvrtcCreateProgram(&program, source.text.c_str(), (source.name + ".cu").c_str(),
                                             static_cast<int>(header_names.size()), header_texts.data(),
                                             header_names.data()));
  const auto destroy = [&](nvrtcProgram* created) { compiler.nvrtcDestroyProgram(created); };
  const std::unique_ptr<nvrtcProgram, decltype(destroy)> destroyed_at_return(&program, destroy);

  const int result = compiler.nvrtcCompileProgram(program, static_cast<int>(options.size()), options.data());
  Compilation compilation;
  std::size_t size = 0;
  compiler.check(compiler.nvrtcGetProgramLogSize(program, &size));
  compilation.log.resize(size);
  compiler.check(compiler.nvrtcGetProgramLog(program, compilation.log.data()));
  compilation.log.resize(size - 1);  // the terminating zero
  if (result != NVRTC_SUCCESS) {
    throw std::runtime_error(join(source.name, " does not compile (NVRTC ", compiler.version(),
                                  "): ", compiler.nvrtcGetErrorString(result), "\n", compilation.log));
  }
  compiler.check(compiler.nvrtcGetCUBINSize(program, &size));
  compilation.cubin.resize(size);
  compiler.check(compiler.nvrtcGetCUBIN(program, compilation.cubin.data()));
  compilation.seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  return compilation;
}

std::string compiler_identity() {
  std::string identity = join("NVRTC ", nvrtc().version());
  for (const char* const option : options) identity += join(" ", option);
  return identity;
}

void set_compiler_folders(const std::vector<std::string>& folders) {
  const std::lock_guard lock(choice().mutex);
  choice().python_folders.assign(folders.begin(), folders.end());
}

std::string describe_compiler() {
  const Nvrtc& compiler = nvrtc();
  return join("NVRTC ", compiler.version(), " (", compiler.path().native(), ")");
}

}  // namespace mate::cuda
