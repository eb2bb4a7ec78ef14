// NVRTC (libnvrtc.so) by the C++ compiler: a kernel becomes a shared library for the emulator's driver, and its cubin
// the path of that. In place of the headers of ptx/ it includes those beside this file.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <string>

namespace fs = std::filesystem;

namespace {

/// A program, in a folder of its own, which stays: its library is opened from there.
struct Program {
  fs::path folder;
  std::string kernel;
  std::string log = {};

  std::string library() const { return folder / "kernel.so"; }
};

void write(const fs::path& path, const std::string& text) { std::ofstream(path) << text; }

std::string read(const fs::path& path) {
  std::ifstream file(path);
  return {std::istreambuf_iterator<char>(file), {}};
}

fs::path new_folder() {
  std::string name = fs::temp_directory_path() / "mate-emulator-XXXXXX";
  if (mkdtemp(name.data()) == nullptr) std::abort();
  return name;
}

}  // namespace

extern "C" {

const char* nvrtcGetErrorString(int) { return "the C++ compiler refuses it"; }

int nvrtcVersion(int* major, int* minor) {
  *major = 13;
  *minor = 0;
  return 0;
}

int nvrtcCreateProgram(Program** program, const char* text, const char* name, int header_count,
                       const char* const* headers, const char* const* header_names) {
  auto* const created = new Program{.folder = new_folder(), .kernel = fs::path(name).stem()};
  for (int i = 0; i < header_count; ++i) {
    const fs::path header = header_names[i];
    if (header.parent_path() == "ptx") continue;
    fs::create_directories(created->folder / header.parent_path());
    write(created->folder / header, headers[i]);
  }
  write(created->folder / "kernel.cpp", "#include \"device.h\"\n" + std::string(text) + R"(
template <typename... Parameters, std::size_t... i>
void call(void (*kernel)(Parameters...), void** arguments, std::index_sequence<i...>) {
  kernel(*static_cast<std::remove_const_t<Parameters>*>(arguments[i])...);
}
template <typename... Parameters>
void call(void (*kernel)(Parameters...), void** arguments) {
  call(kernel, arguments, std::index_sequence_for<Parameters...>());
}
extern "C" void emulator_entry(void** arguments) { call()" +
                                            created->kernel + ", arguments); }\n");
  *program = created;
  return 0;
}

int nvrtcCompileProgram(Program* program, int, const char* const*) {
  const std::string log = program->folder / "log";
  const std::string command = MATE_CXX " -std=c++20 -Og -w -fPIC -shared " MATE_INCLUDES " -I" +
                              program->folder.string() + " -o " + program->library() + " " +
                              (program->folder / "kernel.cpp").string() + " " MATE_DRIVER " > " + log + " 2>&1";
  const int status = std::system(command.c_str());
  program->log = read(log);
  return status == 0 ? 0 : 6;
}

int nvrtcGetProgramLogSize(Program* program, std::size_t* size) {
  *size = program->log.size() + 1;
  return 0;
}
int nvrtcGetProgramLog(Program* program, char* log) {
  std::strcpy(log, program->log.c_str());
  return 0;
}
int nvrtcGetCUBINSize(Program* program, std::size_t* size) {
  *size = program->library().size() + 1;
  return 0;
}
int nvrtcGetCUBIN(Program* program, char* cubin) {
  std::strcpy(cubin, program->library().c_str());
  return 0;
}

int nvrtcDestroyProgram(Program** program) {
  delete *program;
  return 0;
}
}
