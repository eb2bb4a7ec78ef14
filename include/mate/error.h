#pragma once

#include <stdexcept>
#include <string>

namespace mate {

/// What went wrong, in the kinds that Python callers see as exceptions.
enum class ErrorKind {
  type,            ///< a wrong type or dtype (Python: TypeError)
  value,           ///< a wrong shape, value or combination, or a missing argument (Python: ValueError)
  not_implemented  ///< what no backend serves (Python: NotImplementedError)
};

/// Every function of MATE refuses a wrong argument by throwing this, before it has written anything. what() names the
/// argument, what it was and what it must be. Memory that cannot be had is a std::bad_alloc.
class Error : public std::runtime_error {
 public:
  Error(ErrorKind kind, const std::string& message) : std::runtime_error(message), kind_(kind) {}

  ErrorKind kind() const noexcept { return kind_; }

 private:
  ErrorKind kind_;
};

}  // namespace mate
