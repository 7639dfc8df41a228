// Runs the core's tasks on the OpenMP runtime that torch has already loaded.
#ifndef FEINWERK_PYTHON_EXECUTOR_H_
#define FEINWERK_PYTHON_EXECUTOR_H_

#include <string>

#include "feinwerk/feinwerk.h"

namespace feinwerk {

// An executor for `threads` threads: torch's OpenMP pool, or serial when there is none.
feinwerk_executor make_executor(int64_t threads);

// One sentence on how threads run, for backends.describe().
std::string describe_executor();

}  // namespace feinwerk

#endif  // FEINWERK_PYTHON_EXECUTOR_H_
