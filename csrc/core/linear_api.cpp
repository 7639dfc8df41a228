// The products of the C ABI, with and without adapters: validate, then run their phases.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <string>
#include <type_traits>
#include <vector>

#include "core/dispatch.h"
#include "core/parallel.h"
#include "core/status.h"
#include "core/validate.h"

namespace feinwerk {

namespace {

void check_product(const char* op, const feinwerk_weight& weight, feinwerk_dtype dtype, int64_t m,
                   const char* in_name, const void* in, int64_t in_cols, const char* out_name,
                   const void* out, int64_t out_cols) {
  check_weight(op, weight);
  check_dtype(op, "dtype", dtype);
  if (m < 0) invalid(op, "m", "not be negative", m);
  check_buffer(op, in_name, in, checked_product(op, in_name, m, in_cols));
  check_buffer(op, out_name, out, checked_product(op, out_name, m, out_cols));
}

void check_compute(const char* op, feinwerk_compute compute) {
  const int value = static_cast<int>(compute);
  if (value != FEINWERK_COMPUTE_EXACT && value != FEINWERK_COMPUTE_INT8)
    invalid(op, "compute", "be exact (0) or int8 (1)", value);
}

// Sizes and row ranges, which are all that a plan reads of the adapters.
template <class Args>
void check_adapter_sizes(const char* op, const Args& args) {
  // An adapter of rank 0 is its gain alone; it has no gradients.
  constexpr int64_t least = std::is_base_of_v<feinwerk_lora_linear_args, Args> ? 0 : 1;
  if (args.adapter_count < 0) invalid(op, "adapter_count", "not be negative", args.adapter_count);
  check_buffer(op, "adapters", args.adapters, args.adapter_count);
  int64_t end = 0;
  for (int64_t e = 0; e < args.adapter_count; ++e) {
    const feinwerk_adapter& adapter = args.adapters[e];
    if (adapter.r < least) invalid(op, "r", "be at least " + std::to_string(least), adapter.r);
    checked_product(op, "r x K", adapter.r, args.weight.nf4.cols);
    checked_product(op, "N x r", args.weight.nf4.rows, adapter.r);
    if (adapter.row_begin < end || adapter.row_end < adapter.row_begin || adapter.row_end > args.m)
      invalid(op, "row_begin and row_end",
              "ascend from one adapter to the next and stay in [0, " + std::to_string(args.m) + "]",
              std::to_string(adapter.row_begin) + " and " + std::to_string(adapter.row_end));
    end = adapter.row_end;
    if (adapter.r > args.s_cols) invalid(op, "s_cols", "be at least every r", args.s_cols);
  }
  checked_product(op, "m x s_cols", args.m, args.s_cols);
}

template <class Args>
void check_adapters(const char* op, const Args& args) {
  check_adapter_sizes(op, args);
  check_buffer(op, "s", args.s, args.m * args.s_cols);
  for (int64_t e = 0; e < args.adapter_count; ++e) {
    const feinwerk_adapter& adapter = args.adapters[e];
    check_buffer(op, "lora_A", adapter.lora_A, adapter.r * args.weight.nf4.cols);
    check_buffer(op, "lora_B", adapter.lora_B, args.weight.nf4.rows * adapter.r);
    if (!std::isfinite(adapter.scaling))
      invalid(op, "scaling", "be finite", std::to_string(adapter.scaling));
    const int64_t rows = args.weight.nf4.rows;
    if (is_dora(adapter)) check_buffer(op, "weight_norm", adapter.weight_norm, rows);
    if (finds_norm(adapter)) check_buffer(op, "base_norm", adapter.base_norm, rows);
  }
  const float keep_scale = args.dropout.keep_scale;
  if (drops(args.dropout) && !(std::isfinite(keep_scale) && keep_scale >= 1))
    invalid(op, "keep_scale", "be finite and at least 1", std::to_string(keep_scale));
}

// What a plan reads of the base, and where its size goes.
void check_plan(const char* op, const feinwerk_weight& weight, feinwerk_dtype dtype, int64_t m,
                const int64_t* bytes) {
  check_dtype(op, "dtype", dtype);
  if (!weight.dense) check_nf4_blocksize(op, weight.nf4.blocksize);
  checked_product(op, "m x n", m, weight.nf4.rows);
  checked_product(op, "m x k", m, weight.nf4.cols);
  check_buffer(op, "bytes", bytes, 1);
}

int64_t workspace_bytes(const ProductPlan& plan, int64_t threads) {
  return plan.shared_bytes + plan.scratch_bytes * std::max<int64_t>(1, threads);
}

uint8_t* checked_workspace(const char* op, void* workspace, int64_t have, int64_t need) {
  if (have < need) invalid(op, "workspace_bytes", "be at least " + std::to_string(need), have);
  if (need > 0 && (!workspace || reinterpret_cast<uintptr_t>(workspace) % 64 != 0))
    invalid(op, "workspace", "be 64-byte aligned and not null",
            std::to_string(reinterpret_cast<uintptr_t>(workspace)));
  return static_cast<uint8_t*>(workspace);
}

// Both products run alike: every chunk of rows is packed, then every unit of the weight visits it.
template <class Args>
void run_product(const Args& args, const ProductPlan& plan, const feinwerk_executor* executor,
                 uint8_t* workspace,
                 void (*pack)(const Args&, int64_t, int64_t, int64_t, uint8_t*, uint8_t*),
                 void (*unit)(const Args&, int64_t, int64_t, int64_t, const uint8_t*, uint8_t*)) {
  uint8_t* const shared = workspace;
  uint8_t* const scratch = shared + plan.shared_bytes;
  int64_t row = 0;
  do {  // once for no rows at all: weight norms may be wanted
    const int64_t rows = std::min(plan.chunk_rows, args.m - row);
    // A single small piece is packed in less time than it takes to wake a thread.
    for_each_unit(plan.pack_units > 1 ? executor : nullptr, plan.pack_units,
                  [&](int64_t u, int64_t task) {
                    pack(args, row, rows, u, shared, scratch + task * plan.scratch_bytes);
                  });
    for_each_unit(executor, plan.units, [&](int64_t u, int64_t task) {
      unit(args, row, rows, u, shared, scratch + task * plan.scratch_bytes);
    });
    row += plan.chunk_rows;
  } while (row < args.m);
}

bool finds_any_norm(const LinearArgs& args) {
  return std::any_of(args.adapters, args.adapters + args.adapter_count, finds_norm);
}

// The forward in one pass, or in two where the matrix-vector kernels find no norms on their way:
// then no rows at all first.
class Forward {
 public:
  explicit Forward(const LinearArgs& args)
      : args_(args), table_(active_table()), plan_(table_.linear_plan(args)) {
    apart_ = finds_any_norm(args) && !plan_.finds_norms;
    if (!apart_) return;
    alone_.assign(args.adapters, args.adapters + args.adapter_count);
    for (feinwerk_adapter& adapter : alone_) adapter.row_begin = adapter.row_end = 0;
    norms_ = args;
    norms_.m = 0;
    norms_.adapters = alone_.data();
    norms_plan_ = table_.linear_plan(norms_);
  }
  int64_t workspace(int64_t threads) const {
    const int64_t bytes = workspace_bytes(plan_, threads);
    return apart_ ? std::max(bytes, workspace_bytes(norms_plan_, threads)) : bytes;
  }
  void run(const feinwerk_executor* executor, uint8_t* workspace) {
    std::vector<feinwerk_adapter> known;
    if (apart_) {
      run_product(norms_, norms_plan_, executor, workspace, table_.linear_pack, table_.linear_unit);
      known.assign(args_.adapters, args_.adapters + args_.adapter_count);
      for (feinwerk_adapter& adapter : known) adapter.weight_norm_known = 1;
      args_.adapters = known.data();
    }
    if (args_.m > 0 || finds_any_norm(args_))
      run_product(args_, plan_, executor, workspace, table_.linear_pack, table_.linear_unit);
  }

 private:
  LinearArgs args_, norms_ = {};
  const KernelTable& table_;
  ProductPlan plan_, norms_plan_ = {};
  std::vector<feinwerk_adapter> alone_;
  bool apart_ = false;
};

LinearArgs forward_args(const feinwerk_lora_linear_args& args) {
  LinearArgs out = {};
  static_cast<feinwerk_lora_linear_args&>(out) = args;
  return out;
}

LinearArgs plain_args(const feinwerk_nf4_linear_args& args) {
  LinearArgs out = {};
  out.weight.nf4 = args.weight;
  out.x = args.x;
  out.y = args.y;
  out.dtype = args.dtype;
  out.m = args.m;
  out.bias = args.bias;
  out.bias_dtype = args.bias_dtype;
  out.compute = args.compute;
  return out;
}

LinearBackwardArgs plain_args(const feinwerk_nf4_linear_backward_args& args) {
  LinearBackwardArgs out = {};
  out.weight.nf4 = args.weight;
  out.grad_y = args.grad_y;
  out.grad_x = args.grad_x;
  out.dtype = args.dtype;
  out.m = args.m;
  return out;
}

// The backward's phases: dS by rows, then what adapters need by columns, then the gradient of
// magnitude once more where the output does not give it, then dX.
class Backward {
 public:
  explicit Backward(const feinwerk_lora_linear_backward_args& args) : table_(active_table()) {
    static_cast<feinwerk_lora_linear_backward_args&>(args_) = args;
    bool magnitudes = false;
    for (int64_t e = 0; e < args.adapter_count; ++e) {
      magnitudes = magnitudes || args.adapters[e].grad_magnitude;
      needs_ds_ = needs_ds_ || args.adapters[e].grad_A;
    }
    needs_ds_ = needs_ds_ || (args.grad_x && args.adapter_count > 0);
    // Under dropout y is another sum than what the gain multiplies.
    if (has_dropped_product(args)) args_.y = nullptr;
    recomputes_ = magnitudes && !args_.y;
    plan_ = table_.linear_backward_plan(args_);
    adapter_plan_ = table_.adapter_plan(args_);
    if (!magnitudes) return;
    again_.weight = args.weight;
    again_.x = args.x;
    again_.grad_y = args.grad_y;
    again_.dtype = args.dtype;
    again_.m = args.m;
    again_.adapters = args.adapters;
    again_.adapter_count = args.adapter_count;
    again_.s = const_cast<float*>(args.s);  // read only, as grad_y is given
    again_.s_cols = args.s_cols;
    again_.dropout = args.dropout;
    again_plan_ = table_.linear_plan(again_);
  }
  int64_t workspace(int64_t threads) const {
    const int64_t tasks = std::max<int64_t>(1, threads);
    int64_t bytes = adapter_plan_.scratch_bytes * tasks;
    if (args_.grad_x) bytes = std::max(bytes, workspace_bytes(plan_, threads));
    if (again_.m > 0) bytes = std::max(bytes, workspace_bytes(again_plan_, threads));
    return ds_bytes() + bytes;
  }
  void run(const feinwerk_executor* executor, uint8_t* workspace) {
    args_.ds = reinterpret_cast<float*>(workspace);
    uint8_t* const scratch = workspace + ds_bytes();
    const int64_t size = adapter_plan_.scratch_bytes;
    if (needs_ds_)
      for_each_unit(executor, adapter_plan_.row_units, [&](int64_t unit, int64_t task) {
        table_.adapter_rows(args_, unit, scratch + task * size);
      });
    clear_magnitudes();
    std::atomic<bool> good{true};
    for_each_unit(executor, adapter_plan_.column_units, [&](int64_t unit, int64_t task) {
      if (!table_.adapter_columns(args_, unit, scratch + task * size)) good = false;
    });
    if (args_.m > 0 && (recomputes_ || !good)) {
      clear_magnitudes();
      run_product(again_, again_plan_, executor, scratch, table_.linear_pack, table_.linear_unit);
    }
    if (args_.grad_x && args_.m > 0 && args_.weight.nf4.cols > 0)
      run_product(args_, plan_, executor, scratch, table_.linear_backward_pack,
                  table_.linear_backward_unit);
  }

 private:
  int64_t ds_bytes() const { return needs_ds_ ? ceil_div(args_.m * args_.s_cols * 4, 64) * 64 : 0; }
  void clear_magnitudes() {
    for (int64_t e = 0; e < args_.adapter_count; ++e)
      if (float* const grad = args_.adapters[e].grad_magnitude)
        std::fill_n(grad, args_.weight.nf4.rows, 0.0f);
  }

  LinearBackwardArgs args_ = {};
  LinearArgs again_ = {};
  const KernelTable& table_;
  ProductPlan plan_ = {}, again_plan_ = {};
  AdapterPlan adapter_plan_ = {};
  bool needs_ds_ = false, recomputes_ = false;
};

}  // namespace

}  // namespace feinwerk

using namespace feinwerk;

feinwerk_status feinwerk_nf4_linear(const feinwerk_nf4_linear_args* arguments,
                                    const feinwerk_executor* executor) {
  constexpr const char* op = "nf4_linear";
  return guarded([&] {
    const auto args = plain_args(required(op, arguments));
    check_product(op, args.weight, args.dtype, args.m, "x", args.x, args.weight.nf4.cols, "y",
                  args.y, args.weight.nf4.rows);
    check_dtype(op, "bias_dtype", args.bias_dtype);
    check_compute(op, args.compute);
    if (args.m == 0 || args.weight.nf4.rows == 0) return;
    Forward forward(args);
    forward.run(executor, checked_workspace(op, arguments->workspace, arguments->workspace_bytes,
                                            forward.workspace(thread_count(executor))));
  });
}

feinwerk_status feinwerk_nf4_linear_backward(const feinwerk_nf4_linear_backward_args* arguments,
                                             const feinwerk_executor* executor) {
  constexpr const char* op = "nf4_linear_backward";
  return guarded([&] {
    const auto args = plain_args(required(op, arguments));
    check_product(op, args.weight, args.dtype, args.m, "grad_y", args.grad_y, args.weight.nf4.rows,
                  "grad_x", args.grad_x, args.weight.nf4.cols);
    if (args.m == 0 || args.weight.nf4.cols == 0) return;
    Backward backward(args);
    backward.run(executor, checked_workspace(op, arguments->workspace, arguments->workspace_bytes,
                                             backward.workspace(thread_count(executor))));
  });
}

feinwerk_status feinwerk_lora_linear(const feinwerk_lora_linear_args* arguments,
                                     const feinwerk_executor* executor) {
  constexpr const char* op = "lora_linear";
  return guarded([&] {
    const auto args = forward_args(required(op, arguments));
    check_product(op, args.weight, args.dtype, args.m, "x", args.x, args.weight.nf4.cols, "y",
                  args.y, args.weight.nf4.rows);
    check_dtype(op, "bias_dtype", args.bias_dtype);
    check_compute(op, args.compute);
    check_adapters(op, args);
    Forward forward(args);
    forward.run(executor, checked_workspace(op, args.workspace, args.workspace_bytes,
                                            forward.workspace(thread_count(executor))));
  });
}

feinwerk_status feinwerk_lora_linear_backward(const feinwerk_lora_linear_backward_args* arguments,
                                              const feinwerk_executor* executor) {
  constexpr const char* op = "lora_linear_backward";
  return guarded([&] {
    const auto& args = required(op, arguments);
    const int64_t rows = args.weight.nf4.rows, cols = args.weight.nf4.cols;
    check_product(op, args.weight, args.dtype, args.m, "grad_y", args.grad_y, rows, "x", args.x,
                  cols);
    check_dtype(op, "bias_dtype", args.bias_dtype);
    check_adapters(op, args);
    for (int64_t e = 0; e < args.adapter_count; ++e)
      if (finds_norm(args.adapters[e]))
        invalid(op, "weight_norm_known", "be set in the backward", 0);
    Backward backward(args);
    backward.run(executor, checked_workspace(op, args.workspace, args.workspace_bytes,
                                             backward.workspace(thread_count(executor))));
  });
}

feinwerk_status feinwerk_nf4_linear_workspace(int64_t m, int64_t n, int64_t k, int64_t blocksize,
                                              feinwerk_dtype dtype, feinwerk_compute compute,
                                              int64_t threads, int64_t* bytes) {
  constexpr const char* op = "nf4_linear_workspace";
  return guarded([&] {
    LinearArgs args = {};
    args.weight.nf4.rows = n;
    args.weight.nf4.cols = k;
    args.weight.nf4.blocksize = blocksize;
    args.dtype = dtype;
    args.m = m;
    args.compute = compute;
    check_compute(op, compute);
    check_plan(op, args.weight, dtype, m, bytes);
    *bytes = m == 0 ? 0 : Forward(args).workspace(threads);
  });
}

feinwerk_status feinwerk_nf4_linear_backward_workspace(int64_t m, int64_t n, int64_t k,
                                                       int64_t blocksize, feinwerk_dtype dtype,
                                                       int64_t threads, int64_t* bytes) {
  constexpr const char* op = "nf4_linear_backward_workspace";
  return guarded([&] {
    feinwerk_lora_linear_backward_args args = {};
    args.weight.nf4.rows = n;
    args.weight.nf4.cols = k;
    args.weight.nf4.blocksize = blocksize;
    args.dtype = dtype;
    args.m = m;
    args.grad_x = bytes;  // wanted; not written here
    check_plan(op, args.weight, dtype, m, bytes);
    *bytes = Backward(args).workspace(threads);
  });
}

feinwerk_status feinwerk_lora_linear_workspace(const feinwerk_lora_linear_args* arguments,
                                               int64_t threads, int64_t* bytes) {
  constexpr const char* op = "lora_linear_workspace";
  return guarded([&] {
    const auto args = forward_args(required(op, arguments));
    check_plan(op, args.weight, args.dtype, args.m, bytes);
    check_adapter_sizes(op, args);
    *bytes = Forward(args).workspace(threads);
  });
}

feinwerk_status feinwerk_lora_linear_backward_workspace(
    const feinwerk_lora_linear_backward_args* arguments, int64_t threads, int64_t* bytes) {
  constexpr const char* op = "lora_linear_backward_workspace";
  return guarded([&] {
    const auto& args = required(op, arguments);
    check_plan(op, args.weight, args.dtype, args.m, bytes);
    check_adapter_sizes(op, args);
    *bytes = Backward(args).workspace(threads);
  });
}
