// What the linear operators share: vectors and adapters checked, scratch borrowed, the core called.
#include "onnx/linear_runs.h"

#include <algorithm>
#include <cmath>

namespace feinwerk::onnx {

namespace {

constexpr int64_t kFloatBytes = 4;

// What both products take: x, where y goes, and how many rows there are.
template <class Args>
Args begin(const Run& run, const Tensor& x, int64_t n, int64_t k, const void* bias,
           feinwerk_dtype dtype) {
  Args args = {};
  args.x = x.data;
  args.y = output(run.api(), run.context, x, x.rank - 1, n);
  args.dtype = dtype;
  args.m = x.count / k;
  args.bias = bias;
  args.bias_dtype = dtype;
  args.compute = FEINWERK_COMPUTE_EXACT;
  return args;
}

int64_t aligned(int64_t bytes) { return ceil_div(bytes, kScratchAlignment) * kScratchAlignment; }

}  // namespace

void check_vector(const char* op, const char* name, const Tensor& tensor, int64_t n) {
  if (tensor.rank != 1 || (tensor.dims[0] != 0 && tensor.dims[0] != n))
    reject(op, name, "have shape [N = " + std::to_string(n) + "]", shape_text(tensor));
}

bool AdapterInputs::check(size_t index, const char* name, const Tensor& tensor, int64_t n,
                          int64_t k) const {
  if (index < first_ || index > first_ + 3) return false;
  check_type(op_, name, tensor, ort::kFloat);
  switch (index - first_) {
    case 0:
      check_matrix(op_, name, tensor, -1, k, "[r, K = " + std::to_string(k) + "]");
      break;
    case 1:
      check_matrix(op_, name, tensor, n, -1, "[N = " + std::to_string(n) + ", r]");
      break;
    case 2:
      check_count(op_, name, tensor, 1);
      if (!std::isfinite(*tensor.floats()))
        reject(op_, name, "be finite", std::to_string(*tensor.floats()));
      break;
    case 3:
      check_vector(op_, name, tensor, n);
      break;
  }
  return true;
}

AdapterInputs::Adapter AdapterInputs::read(const Run& run) const {
  const Tensor &a = run[first_], &b = run[first_ + 1], &scaling = run[first_ + 2];
  if (!a.exists || !b.exists || !scaling.exists)
    reject(op_, "lora_A, lora_B and scaling", "be given", "none");
  if (b.dims[1] != a.dims[0])
    reject(op_, "lora_B", "have shape [N, r = " + std::to_string(a.dims[0]) + "] as lora_A has",
           shape_text(b));
  return {a.dims[0], a.floats(), b.floats(), run[first_ + 3].floats(), *scaling.floats()};
}

void run_nf4_linear(const Run& run, const Tensor& x, const feinwerk_nf4_weight& weight,
                    const void* bias, feinwerk_dtype dtype) {
  auto args = begin<feinwerk_nf4_linear_args>(run, x, weight.rows, weight.cols, bias, dtype);
  args.weight = weight;
  if (args.m == 0) return;
  require(feinwerk_nf4_linear_workspace(args.m, weight.rows, weight.cols, weight.blocksize, dtype,
                                        args.compute, task_count(), &args.workspace_bytes));
  const Scratch scratch(args.workspace_bytes);
  args.workspace = scratch.data();
  const Executor executor(run.api(), run.context);
  require(feinwerk_nf4_linear(&args, executor.get()));
}

void run_lora_linear(const Run& run, const Tensor& x, const feinwerk_weight& weight,
                     const AdapterInputs::Adapter& adapter, const void* bias,
                     feinwerk_dtype dtype) {
  const int64_t n = weight.nf4.rows;
  auto args = begin<feinwerk_lora_linear_args>(run, x, n, weight.nf4.cols, bias, dtype);
  args.weight = weight;
  if (args.m == 0) return;
  feinwerk_adapter one = {};
  one.r = adapter.r;
  one.lora_A = adapter.lora_A;
  one.lora_B = adapter.lora_B;
  one.scaling = adapter.scaling;
  one.row_end = args.m;
  // The gain is magnitude / weight_norm already: a norm of one leaves its bits as they are.
  one.magnitude = adapter.gain;
  one.weight_norm_known = adapter.gain != nullptr;
  args.adapters = &one;
  args.adapter_count = adapter.any();
  args.s_cols = adapter.r;
  // The norms' address is not read here, only that there is one.
  float unread = 1;
  if (adapter.gain) one.weight_norm = &unread;
  require(feinwerk_lora_linear_workspace(&args, task_count(), &args.workspace_bytes));
  const int64_t s_bytes =
      aligned(checked_product(run.inputs.op(), "rows x r", args.m, adapter.r) * kFloatBytes);
  const int64_t norm_bytes = adapter.gain ? aligned(n * kFloatBytes) : 0;
  const int64_t workspace_bytes = aligned(args.workspace_bytes);
  const Scratch scratch(workspace_bytes + s_bytes + norm_bytes);
  args.workspace = scratch.data();
  args.s = reinterpret_cast<float*>(scratch.data() + workspace_bytes);
  if (adapter.gain) {
    one.weight_norm = reinterpret_cast<float*>(scratch.data() + workspace_bytes + s_bytes);
    std::fill_n(one.weight_norm, n, 1.0f);
  }
  const Executor executor(run.api(), run.context);
  require(feinwerk_lora_linear(&args, executor.get()));
}

void infer_last_dimension(const Shapes& shapes, size_t index, const char* attribute) {
  Shapes::Shape shape;
  int64_t size = 0;
  if (!shapes.get(index, &shape) || !shapes.integer(attribute, &size) || size < 1) return;
  shape.dims.back() = size;
  shape.names.back().clear();
  shapes.set_output(shape);
}

}  // namespace feinwerk::onnx
