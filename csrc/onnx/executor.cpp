// KernelContext_ParallelFor as the core's executor.
#include "onnx/executor.h"

#include <algorithm>
#include <atomic>
#include <thread>

#if defined(__linux__)
#include <sched.h>
#endif

#include "onnx/host.h"

namespace feinwerk::onnx {

namespace {

constexpr int64_t kMaxTasks = 128;  // each has its own part of the scratch

int64_t usable_cpus() {
#if defined(__linux__)
  cpu_set_t set;
  if (sched_getaffinity(0, sizeof(set), &set) == 0) return CPU_COUNT(&set);
#endif
  return std::thread::hardware_concurrency();
}

}  // namespace

int64_t task_count() {
  static const int64_t count = std::clamp<int64_t>(usable_cpus(), 1, kMaxTasks);
  return count;
}

Executor::Executor(const ort::Api* api, const OrtKernelContext* context)
    : api_(api), context_(context), executor_{this, task_count(), parallel_for} {}

void Executor::parallel_for(void* self, int64_t tasks, void (*fn)(void*, int64_t), void* arg) {
  struct Work {
    void (*fn)(void*, int64_t);
    void* arg;
    std::atomic<int64_t> next;
  } work{fn, arg, {0}};
  const auto& executor = *static_cast<const Executor*>(self);
  // Numbered in the order in which they start, so that the same few parts of the scratch, which
  // are in the cache, serve however many tasks there are.
  OrtStatus* const status = ort::KernelContext_ParallelFor(
      executor.api_, executor.context_,
      [](void* data, size_t) {
        auto& shared = *static_cast<Work*>(data);
        shared.fn(shared.arg, shared.next.fetch_add(1, std::memory_order_relaxed));
      },
      static_cast<size_t>(tasks), 0, &work);
  // Without the session's threads one task does all that is left.
  if (!succeeded(executor.api_, status)) fn(arg, 0);
}

}  // namespace feinwerk::onnx
