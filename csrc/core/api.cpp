// The operations of the C ABI: validate, choose the instruction set, split the work.
#include <algorithm>
#include <atomic>
#include <string>
#include <vector>

#include "core/blockwise.h"
#include "core/dispatch.h"
#include "core/parallel.h"
#include "core/status.h"
#include "core/validate.h"

namespace feinwerk {

namespace {

// Enough work for a thread to be worth waking: about 10 us at 1 to 10 GB/s.
constexpr int64_t kGrainElements = 1 << 16;
constexpr int64_t kHugePage = 2 << 20;  // bytes

int64_t element_bytes(feinwerk_dtype dtype) { return dtype == FEINWERK_FLOAT32 ? 4 : 2; }

template <class Args>
const Args& required(const char* op, const Args* args) {
  if (!args) invalid(op, "args", "not be null", "null");
  return *args;
}

void check_product(const char* op, const feinwerk_nf4_weight& weight, feinwerk_dtype dtype,
                   int64_t m, const char* in_name, const void* in, int64_t in_cols,
                   const char* out_name, const void* out, int64_t out_cols) {
  check_weight(op, weight);
  check_dtype(op, "dtype", dtype);
  if (m < 0) invalid(op, "m", "not be negative", m);
  check_buffer(op, in_name, in, checked_product(op, in_name, m, in_cols));
  check_buffer(op, out_name, out, checked_product(op, out_name, m, out_cols));
}

int64_t workspace_bytes(const ProductPlan& plan, int64_t threads) {
  return plan.shared_bytes + plan.scratch_bytes * std::max<int64_t>(1, threads);
}

// Both products run alike: every chunk of rows is packed, then every unit of the weight visits it.
template <class Args>
void run_product(const char* op, const Args& args, const ProductPlan& plan,
                 const feinwerk_executor* executor,
                 void (*pack)(const Args&, int64_t, int64_t, int64_t, uint8_t*),
                 void (*unit)(const Args&, int64_t, int64_t, int64_t, const uint8_t*, uint8_t*)) {
  const int64_t need = workspace_bytes(plan, thread_count(executor));
  if (args.workspace_bytes < need)
    invalid(op, "workspace_bytes", "be at least " + std::to_string(need), args.workspace_bytes);
  if (need > 0 && (!args.workspace || reinterpret_cast<uintptr_t>(args.workspace) % 64 != 0))
    invalid(op, "workspace", "be 64-byte aligned and not null",
            std::to_string(reinterpret_cast<uintptr_t>(args.workspace)));
  uint8_t* shared = static_cast<uint8_t*>(args.workspace);
  uint8_t* scratch = shared + plan.shared_bytes;
  for (int64_t row = 0; row < args.m; row += plan.chunk_rows) {
    const int64_t rows = std::min(plan.chunk_rows, args.m - row);
    // A single small piece is packed in less time than it takes to wake a thread.
    for_each_unit(plan.pack_units > 1 ? executor : nullptr, plan.pack_units,
                  [&](int64_t u, int64_t) { pack(args, row, rows, u, shared); });
    for_each_unit(executor, plan.units, [&](int64_t u, int64_t task) {
      unit(args, row, rows, u, shared, scratch + task * plan.scratch_bytes);
    });
  }
}

// A plan reads shapes, dtypes and options only; these fill in just that.
feinwerk_nf4_linear_args linear_shape(int64_t m, int64_t n, int64_t k, int64_t blocksize,
                                      feinwerk_dtype dtype, feinwerk_compute compute) {
  feinwerk_nf4_linear_args args = {};
  args.weight.rows = n;
  args.weight.cols = k;
  args.weight.blocksize = blocksize;
  args.dtype = dtype;
  args.m = m;
  args.compute = compute;
  return args;
}

void check_compute(const char* op, feinwerk_compute compute) {
  const int value = static_cast<int>(compute);
  if (value != FEINWERK_COMPUTE_EXACT && value != FEINWERK_COMPUTE_INT8)
    invalid(op, "compute", "be exact (0) or int8 (1)", value);
}

}  // namespace

}  // namespace feinwerk

using namespace feinwerk;

feinwerk_status feinwerk_nf4_quantize(const feinwerk_nf4_quantize_args* arguments,
                                      const feinwerk_executor* executor) {
  constexpr const char* op = "nf4_quantize";
  return guarded([&] {
    const auto& args = required(op, arguments);
    check_dtype(op, "dtype", args.dtype);
    check_rule(op, args.rule);
    check_nf4_blocksize(op, args.blocksize);
    checked_product(op, "count", args.count, 1);
    const int64_t blocks = ceil_div(args.count, args.blocksize);
    check_count(op, "packed_bytes", args.packed_bytes, ceil_div(args.count, 2));
    check_count(op, "absmax_count", args.absmax_count, blocks);
    check_buffer(op, "weight", args.weight, args.count);
    check_buffer(op, "packed", args.packed, args.count);
    check_buffer(op, "absmax", args.absmax, blocks);
    const KernelTable& table = active_table();
    std::atomic<bool> finite{true};
    for_each_range(executor, blocks, std::max<int64_t>(1, kGrainElements / args.blocksize),
                   [&](int64_t begin, int64_t end) {
                     if (!table.nf4_quantize(args, begin, end)) finite = false;
                   });
    if (!finite && !args.allow_non_finite)
      throw Failure{FEINWERK_NON_FINITE,
                    "nf4_quantize: weight must be finite, got NaN or infinity; pass "
                    "allow_non_finite=True to quantize it as bitsandbytes does"};
  });
}

feinwerk_status feinwerk_nf4_dequantize(const feinwerk_nf4_dequantize_args* arguments,
                                        const feinwerk_executor* executor) {
  constexpr const char* op = "nf4_dequantize";
  return guarded([&] {
    const auto& args = required(op, arguments);
    check_weight(op, args.weight);
    check_dtype(op, "dtype", args.dtype);
    const int64_t count = args.weight.rows * args.weight.cols;
    check_count(op, "out_count", args.out_count, count);
    check_buffer(op, "out", args.out, count);
    const KernelTable& table = active_table();
    // A large output is fresh memory, in huge pages where the host has any. Who touches a page
    // first waits until the system has cleared it, and so does everyone else in it: a page or more
    // each.
    const int64_t page = kHugePage / element_bytes(args.dtype);
    const int64_t grain = count >= 8 * page ? page : kGrainElements;
    for_each_range(executor, count, grain, [&](int64_t begin, int64_t end) {
      table.nf4_dequantize(args.weight, begin, end, args.dtype,
                           static_cast<uint8_t*>(args.out) + begin * element_bytes(args.dtype));
    });
  });
}

feinwerk_status feinwerk_nf4_linear(const feinwerk_nf4_linear_args* arguments,
                                    const feinwerk_executor* executor) {
  constexpr const char* op = "nf4_linear";
  return guarded([&] {
    const auto& args = required(op, arguments);
    check_product(op, args.weight, args.dtype, args.m, "x", args.x, args.weight.cols, "y", args.y,
                  args.weight.rows);
    check_dtype(op, "bias_dtype", args.bias_dtype);
    check_compute(op, args.compute);
    if (args.m == 0 || args.weight.rows == 0) return;
    const KernelTable& table = active_table();
    run_product(op, args, table.nf4_linear_plan(args), executor, table.nf4_linear_pack,
                table.nf4_linear_unit);
  });
}

feinwerk_status feinwerk_nf4_linear_backward(const feinwerk_nf4_linear_backward_args* arguments,
                                             const feinwerk_executor* executor) {
  constexpr const char* op = "nf4_linear_backward";
  return guarded([&] {
    const auto& args = required(op, arguments);
    check_product(op, args.weight, args.dtype, args.m, "grad_y", args.grad_y, args.weight.rows,
                  "grad_x", args.grad_x, args.weight.cols);
    if (args.m == 0 || args.weight.cols == 0) return;
    const KernelTable& table = active_table();
    run_product(op, args, table.nf4_linear_backward_plan(args), executor,
                table.nf4_linear_backward_pack, table.nf4_linear_backward_unit);
  });
}

feinwerk_status feinwerk_nf4_embedding(const feinwerk_nf4_embedding_args* arguments,
                                       const feinwerk_executor* executor) {
  constexpr const char* op = "nf4_embedding";
  return guarded([&] {
    const auto& args = required(op, arguments);
    check_weight(op, args.weight);
    check_dtype(op, "dtype", args.dtype);
    const int64_t cols = args.weight.cols;
    const int64_t count = checked_product(op, "indices_count", args.indices_count, cols);
    check_buffer(op, "indices", args.indices, args.indices_count);
    check_count(op, "out_count", args.out_count, count);
    check_buffer(op, "out", args.out, count);
    for (int64_t i = 0; i < args.indices_count; ++i) {
      const int64_t index = args.indices[i];
      if (index < 0 || index >= args.weight.rows)
        throw Failure{FEINWERK_OUT_OF_RANGE, "nf4_embedding: indices must be in [0, " +
                                                 std::to_string(args.weight.rows) + "), got " +
                                                 std::to_string(index)};
    }
    const KernelTable& table = active_table();
    const int64_t grain = std::max<int64_t>(1, kGrainElements / std::max<int64_t>(1, cols));
    for_each_range(executor, args.indices_count, grain, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t first = args.indices[i] * cols;
        table.nf4_dequantize(
            args.weight, first, first + cols, args.dtype,
            static_cast<uint8_t*>(args.out) + i * cols * element_bytes(args.dtype));
      }
    });
  });
}

feinwerk_status feinwerk_blockwise_quantize(const feinwerk_blockwise_quantize_args* arguments,
                                            const feinwerk_executor* executor) {
  constexpr const char* op = "blockwise_quantize";
  return guarded([&] {
    const auto& args = required(op, arguments);
    check_rule(op, args.rule);
    checked_product(op, "count", args.count, 1);
    if (args.blocksize < 1) invalid(op, "blocksize", "be positive", args.blocksize);
    const int64_t blocks = ceil_div(args.count, args.blocksize);
    check_count(op, "absmax_count", args.absmax_count, blocks);
    check_buffer(op, "x", args.x, args.count);
    check_buffer(op, "codes", args.codes, args.count);
    check_buffer(op, "absmax", args.absmax, blocks);
    check_buffer(op, "codebook", args.codebook, 256);
    check_buffer(op, "offset", args.offset, 1);
    const float offset = args.center && args.count > 0 ? ordered_mean(args.x, args.count) : 0.0f;
    *args.offset = offset;
    std::vector<uint8_t> bins;
    if (args.rule == FEINWERK_RULE_CPU && args.count > 0) {
      bins.resize(kBinCount);
      fill_bins(args.codebook, bins.data());
    }
    const KernelTable& table = active_table();
    for_each_range(executor, blocks, std::max<int64_t>(1, kGrainElements / args.blocksize),
                   [&](int64_t begin, int64_t end) {
                     table.blockwise_quantize(args, offset, bins.data(), begin, end);
                   });
  });
}

feinwerk_status feinwerk_blockwise_dequantize(const feinwerk_blockwise_dequantize_args* arguments,
                                              const feinwerk_executor* executor) {
  constexpr const char* op = "blockwise_dequantize";
  return guarded([&] {
    const auto& args = required(op, arguments);
    checked_product(op, "count", args.count, 1);
    if (args.blocksize < 1) invalid(op, "blocksize", "be positive", args.blocksize);
    const int64_t blocks = ceil_div(args.count, args.blocksize);
    check_count(op, "absmax_count", args.absmax_count, blocks);
    check_buffer(op, "codes", args.codes, args.count);
    check_buffer(op, "absmax", args.absmax, blocks);
    check_buffer(op, "codebook", args.codebook, 256);
    check_buffer(op, "out", args.out, args.count);
    const KernelTable& table = active_table();
    for_each_range(
        executor, blocks, std::max<int64_t>(1, kGrainElements / args.blocksize),
        [&](int64_t begin, int64_t end) { table.blockwise_dequantize(args, begin, end); });
  });
}

feinwerk_status feinwerk_nf4_linear_workspace(int64_t m, int64_t n, int64_t k, int64_t blocksize,
                                              feinwerk_dtype dtype, feinwerk_compute compute,
                                              int64_t threads, int64_t* bytes) {
  constexpr const char* op = "nf4_linear_workspace";
  return guarded([&] {
    check_dtype(op, "dtype", dtype);
    check_compute(op, compute);
    check_nf4_blocksize(op, blocksize);
    checked_product(op, "m x n", m, n);
    checked_product(op, "m x k", m, k);
    check_buffer(op, "bytes", bytes, 1);
    const auto args = linear_shape(m, n, k, blocksize, dtype, compute);
    *bytes = workspace_bytes(active_table().nf4_linear_plan(args), threads);
  });
}

feinwerk_status feinwerk_nf4_linear_backward_workspace(int64_t m, int64_t n, int64_t k,
                                                       int64_t blocksize, feinwerk_dtype dtype,
                                                       int64_t threads, int64_t* bytes) {
  constexpr const char* op = "nf4_linear_backward_workspace";
  return guarded([&] {
    check_dtype(op, "dtype", dtype);
    check_nf4_blocksize(op, blocksize);
    checked_product(op, "m x n", m, n);
    checked_product(op, "m x k", m, k);
    check_buffer(op, "bytes", bytes, 1);
    feinwerk_nf4_linear_backward_args args = {};
    args.weight.rows = n;
    args.weight.cols = k;
    args.weight.blocksize = blocksize;
    args.dtype = dtype;
    args.m = m;
    *bytes = workspace_bytes(active_table().nf4_linear_backward_plan(args), threads);
  });
}
