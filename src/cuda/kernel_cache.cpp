#include "kernel_cache.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <map>
#include <mutex>
#include <optional>
#include <random>
#include <string_view>
#include <system_error>
#include <utility>

#include "attention/check.h"
#include "sha256.h"
#include "sources.h"

namespace mate::cuda {
namespace {

namespace fs = std::filesystem;

/// Begins every file. Another layout of the files needs another number.
constexpr std::string_view magic = "MATE kernel 1\n";

/// With MATE_LOG=compile, a line on stderr.
template <typename... Parts>
void log(const Parts&... parts) {
  const char* const wanted = std::getenv("MATE_LOG");
  if (wanted == nullptr || std::string_view(wanted) != "compile") return;
  std::fputs(join("mate: ", parts..., "\n").c_str(), stderr);
}

class File {
 public:
  explicit File(int descriptor) : descriptor_(descriptor) {}
  File(File&& other) noexcept : descriptor_(std::exchange(other.descriptor_, -1)) {}
  ~File() {
    if (is_open()) close(descriptor_);
  }

  bool is_open() const { return descriptor_ >= 0; }
  int descriptor() const { return descriptor_; }

 private:
  int descriptor_;
};

/// Empty where the environment names no place.
fs::path folder_path() {
  const auto variable = [](const char* name) {
    const char* const value = std::getenv(name);
    return fs::path(value == nullptr ? "" : value);
  };
  if (const fs::path folder = variable("MATE_CACHE_DIR"); !folder.empty()) return folder;
  if (const fs::path caches = variable("XDG_CACHE_HOME"); caches.is_absolute()) return caches / "mate";
  if (const fs::path home = variable("HOME"); home.is_absolute()) return home / ".cache" / "mate";
  return {};
}

/// Whether nobody but this user may write to it.
bool is_private(const File& file) {
  struct stat status = {};
  return fstat(file.descriptor(), &status) == 0 && status.st_uid == geteuid() &&
         (status.st_mode & (S_IWGRP | S_IWOTH)) == 0;
}

/// The folder, made where there is none. Not open, with errno, where it cannot be had.
File open_folder(const fs::path& path) {
  fs::path made;
  for (const fs::path& part : path) mkdir((made /= part).c_str(), S_IRWXU);
  File folder(open(path.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC));
  if (folder.is_open() && !is_private(folder)) {
    fail(ErrorKind::value, "MATE does not load kernels from ", path,
         ", where another user may have written them: make the folder your own, with mode 0700, or set MATE_CACHE_DIR "
         "to another");
  }
  return folder;
}

/// Everything that decides what a kernel compiles to.
Digest key_of(const KernelSource& source) {
  static const std::string headers = [] {
    std::string text;
    for (const EmbeddedHeader& header : embedded_headers()) text += join(header.name, '\0', header.text, '\0');
    return to_hex(sha256(text));
  }();
  return sha256(join(magic, compiler_identity(), '\0', headers, '\0', source.name, '\0', source.text));
}

std::string_view bytes_of(const Digest& digest) {
  return {reinterpret_cast<const char*>(digest.data()), digest.size()};
}

/// What a file holds: its length and hash tell a damaged one.
std::string pack(const Digest& key, std::string_view cubin) {
  return join(magic, bytes_of(key), bytes_of(sha256(cubin)), cubin);
}

std::optional<std::string> unpack(const Digest& key, std::string_view file) {
  const std::size_t header = pack(key, {}).size();
  if (file.size() < header) return std::nullopt;
  const std::string_view cubin = file.substr(header);
  return pack(key, cubin) == file ? std::optional<std::string>(cubin) : std::nullopt;
}

std::string read_all(const File& file) {
  std::string content;
  char buffer[1 << 16];
  ssize_t count = 0;
  while ((count = read(file.descriptor(), buffer, sizeof buffer)) > 0) content.append(buffer, count);
  return content;
}

bool write_all(const File& file, std::string_view content) {
  while (!content.empty()) {
    const ssize_t count = write(file.descriptor(), content.data(), content.size());
    if (count < 0) return false;
    content.remove_prefix(count);
  }
  return true;
}

std::optional<std::string> load(const fs::path& path, const std::string& name, const Digest& key) {
  const File folder = open_folder(path);
  if (!folder.is_open()) return std::nullopt;
  const File file(openat(folder.descriptor(), name.c_str(), O_RDONLY | O_NOFOLLOW | O_CLOEXEC));
  if (!file.is_open() || !is_private(file)) return std::nullopt;
  return unpack(key, read_all(file));
}

/// Readers see the whole file or none of it: it is written aside and then renamed. False, with errno, where it cannot.
bool store(const fs::path& path, const std::string& name, std::string_view content) {
  const File folder = open_folder(path);
  if (!folder.is_open()) return false;
  std::random_device random;
  const std::string aside = join(name, ".", random(), ".", random());
  const File file(
      openat(folder.descriptor(), aside.c_str(), O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, S_IRUSR | S_IWUSR));
  if (!file.is_open()) return false;
  if (write_all(file, content) &&
      renameat(folder.descriptor(), aside.c_str(), folder.descriptor(), name.c_str()) == 0) {
    return true;
  }
  const int reason = errno;
  unlinkat(folder.descriptor(), aside.c_str(), 0);
  errno = reason;
  return false;
}

double seconds_since(std::chrono::steady_clock::time_point start) {
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

/// Kernels that the folder did not take.
struct Unstored {
  std::mutex mutex;
  std::map<Digest, std::string> cubins;

  std::optional<std::string> find(const Digest& key) {
    const std::lock_guard lock(mutex);
    const auto found = cubins.find(key);
    return found == cubins.end() ? std::nullopt : std::optional(found->second);
  }
  void add(const Digest& key, const std::string& cubin) {
    const std::lock_guard lock(mutex);
    cubins.emplace(key, cubin);
  }
};

}  // namespace

CachedKernel cached_kernel(const KernelSource& source) {
  static Unstored unstored;
  const auto start = std::chrono::steady_clock::now();
  const Digest key = key_of(source);
  const fs::path folder = folder_path();
  const std::string file = join(source.name, ".", to_hex(key).substr(0, 32));
  if (std::optional<std::string> cubin = load(folder, file, key)) {
    log("read ", source.name, " from ", (folder / file).native(), " in ", seconds_since(start), " s, ", cubin->size(),
        " bytes");
    return {*std::move(cubin), false};
  }
  if (std::optional<std::string> cubin = unstored.find(key)) return {*std::move(cubin), false};

  Compilation compilation = compile(source);
  log("compiled ", source.name, " in ", compilation.seconds, " s, ", compilation.cubin.size(), " bytes");
  if (!store(folder, file, pack(key, compilation.cubin))) {
    log("cannot keep ", source.name, " in ", folder, ": ", std::generic_category().message(errno));
    unstored.add(key, compilation.cubin);
  }
  return {std::move(compilation.cubin), true};
}

std::string describe_cache() { return join("kernels are kept in ", folder_path()); }

}  // namespace mate::cuda
