// The one way an operation fails: throw Failure, and guarded() turns it into a status and a
// message.
#ifndef FEINWERK_CORE_STATUS_H_
#define FEINWERK_CORE_STATUS_H_

#include <exception>
#include <string>
#include <utility>

#include "feinwerk/feinwerk.h"

namespace feinwerk {

struct Failure {
  feinwerk_status status;
  std::string message;
};

void set_last_error(const std::string& message) noexcept;

// "<op>: <name> must <rule>, got <value>"
[[noreturn]] inline void invalid(const char* op, const char* name, const std::string& rule,
                                 const std::string& value) {
  throw Failure{FEINWERK_INVALID_ARGUMENT,
                std::string(op) + ": " + name + " must " + rule + ", got " + value};
}

[[noreturn]] inline void invalid(const char* op, const char* name, const std::string& rule,
                                 int64_t value) {
  invalid(op, name, rule, std::to_string(value));
}

template <class Args>
const Args& required(const char* op, const Args* args) {
  if (!args) invalid(op, "args", "not be null", "null");
  return *args;
}

// Runs body; the only catch of the library. Nothing may cross the C boundary but a status.
template <class Body>
feinwerk_status guarded(Body&& body) noexcept {
  try {
    std::forward<Body>(body)();
    return FEINWERK_OK;
  } catch (const Failure& failure) {
    set_last_error(failure.message);
    return failure.status;
  } catch (const std::exception& error) {
    set_last_error(error.what());
    return FEINWERK_INTERNAL;
  } catch (...) {
    set_last_error("unknown C++ exception");
    return FEINWERK_INTERNAL;
  }
}

}  // namespace feinwerk

#endif  // FEINWERK_CORE_STATUS_H_
