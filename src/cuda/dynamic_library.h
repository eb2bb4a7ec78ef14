// Functions of libraries that are opened while the program runs.
#pragma once

#include <dlfcn.h>

#include <stdexcept>

namespace mate::cuda {

/// A function of a library that dlopen gave: becomes a pointer of the type that it initialises.
class LibraryFunction {
 public:
  /// Throws std::runtime_error where the library has no such function.
  LibraryFunction(void* library, const char* name) : address_(dlsym(library, name)) {
    if (address_ == nullptr) throw std::runtime_error(dlerror());
  }

  template <typename Signature>
  operator Signature*() const {
    return reinterpret_cast<Signature*>(address_);
  }

 private:
  void* address_;
};

}  // namespace mate::cuda
