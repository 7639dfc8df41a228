// The message of the last failure, one a thread.
#include "core/status.h"

namespace feinwerk {

namespace {
thread_local std::string last_error;
}  // namespace

void set_last_error(const std::string& message) noexcept {
  try {
    last_error = message;
  } catch (...) {
    last_error.clear();
  }
}

}  // namespace feinwerk

const char* feinwerk_last_error(void) { return feinwerk::last_error.c_str(); }

const char* feinwerk_version(void) { return FEINWERK_VERSION; }
