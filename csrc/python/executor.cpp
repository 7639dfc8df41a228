// The OpenMP executor, bound at run time. Linking against libgomp would load a second copy beside
// the one torch ships whenever their names differ, and two pools that take turns on the same cores
// cost milliseconds a call where one costs microseconds.
#include "executor.h"

#include <dlfcn.h>
#include <pthread.h>
#include <unistd.h>

#include <atomic>

namespace feinwerk {

namespace {

// The entry point of libgomp's ABI that `#pragma omp parallel num_threads(n)` compiles to.
using GompParallel = void (*)(void (*fn)(void*), void* data, unsigned threads, unsigned flags);

// Null when no OpenMP runtime can be loaded.
GompParallel openmp_parallel() {
  static const GompParallel found = [] {
    // torch's copy is in the global scope; a library of the system only when there is none.
    void* entry = dlsym(RTLD_DEFAULT, "GOMP_parallel");
    if (!entry)
      if (void* const handle = dlopen("libgomp.so.1", RTLD_NOW))
        entry = dlsym(handle, "GOMP_parallel");
    return reinterpret_cast<GompParallel>(entry);
  }();
  return found;
}

// libgomp's pool does not survive fork(): a child that used it would wait for threads that are
// gone.
std::atomic<bool> forked{false};

void watch_fork() {
  static const int registered = pthread_atfork(nullptr, nullptr, [] { forked = true; });
  (void)registered;
}

void run_openmp(void*, int64_t tasks, void (*fn)(void*, int64_t), void* arg) {
  struct Work {
    void (*fn)(void*, int64_t);
    void* arg;
    int64_t tasks;
    std::atomic<int64_t> next;
  } work{fn, arg, tasks, {0}};
  // Tasks are taken, not dealt: libgomp may start fewer threads than asked for.
  openmp_parallel()(
      [](void* data) {
        auto& shared = *static_cast<Work*>(data);
        for (int64_t task; (task = shared.next.fetch_add(1)) < shared.tasks;)
          shared.fn(shared.arg, task);
      },
      &work, static_cast<unsigned>(tasks), 0);
}

}  // namespace

feinwerk_executor make_executor(int64_t threads) {
  watch_fork();
  const bool parallel = threads > 1 && !forked && openmp_parallel();
  return {nullptr, parallel ? threads : 1, parallel ? run_openmp : nullptr};
}

std::string describe_executor() {
  if (forked) return "serial: this process was forked, and OpenMP pools do not survive a fork";
  if (!openmp_parallel()) return "serial: no OpenMP runtime (libgomp.so.1) could be loaded";
  return "OpenMP, the runtime of this process";
}

}  // namespace feinwerk
