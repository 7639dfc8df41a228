// Runs the core's parallel work on the threads of an ONNX Runtime session.
#ifndef FEINWERK_ONNX_EXECUTOR_H_
#define FEINWERK_ONNX_EXECUTOR_H_

#include "feinwerk/feinwerk.h"
#include "onnx/ort_abi.h"

namespace feinwerk::onnx {

// Nothing tells how many threads a session has. So there are as many tasks as CPUs this process may
// use: tasks fetch units of work until none is left, and those that no thread had time for find
// nothing to do. What a run computes never depends on either number.
int64_t task_count();

// The threads of one run.
class Executor {
 public:
  Executor(const ort::Api* api, const OrtKernelContext* context);
  Executor(const Executor&) = delete;
  Executor& operator=(const Executor&) = delete;
  const feinwerk_executor* get() const { return &executor_; }

 private:
  static void parallel_for(void* self, int64_t tasks, void (*fn)(void*, int64_t), void* arg);

  const ort::Api* api_;
  const OrtKernelContext* context_;
  feinwerk_executor executor_;
};

}  // namespace feinwerk::onnx

#endif  // FEINWERK_ONNX_EXECUTOR_H_
