// The operations of the C ABI but for the products (linear_api.cpp): validate, choose the
// instruction set, split the work.
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

// How many blocks, none of which crosses a row, and how many of them are worth waking a thread.
struct Blocks {
  int64_t count, grain;
};

template <class Args>
Blocks blocks_of(const char* op, const Args& args) {
  checked_product(op, "count", args.count, 1);
  if (args.blocksize < 1) invalid(op, "blocksize", "be positive", args.blocksize);
  if (args.row_length < 0) invalid(op, "row_length", "not be negative", args.row_length);
  const int64_t row = args.row_length ? args.row_length : args.count;
  if (row == 0) return {0, 1};
  if (args.count % row != 0)
    invalid(op, "row_length", "divide count = " + std::to_string(args.count), row);
  const int64_t elements = std::min(args.blocksize, row);
  return {args.count / row * ceil_div(row, args.blocksize),
          std::max<int64_t>(1, kGrainElements / elements)};
}

int64_t element_bytes(feinwerk_dtype dtype) { return dtype == FEINWERK_FLOAT32 ? 4 : 2; }

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
    const Blocks blocks = blocks_of(op, args);
    check_count(op, "absmax_count", args.absmax_count, blocks.count);
    check_buffer(op, "x", args.x, args.count);
    check_buffer(op, "codes", args.codes, args.count);
    check_buffer(op, "absmax", args.absmax, blocks.count);
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
    for_each_range(executor, blocks.count, blocks.grain, [&](int64_t begin, int64_t end) {
      table.blockwise_quantize(args, offset, bins.data(), begin, end);
    });
  });
}

feinwerk_status feinwerk_blockwise_dequantize(const feinwerk_blockwise_dequantize_args* arguments,
                                              const feinwerk_executor* executor) {
  constexpr const char* op = "blockwise_dequantize";
  return guarded([&] {
    const auto& args = required(op, arguments);
    const Blocks blocks = blocks_of(op, args);
    check_count(op, "absmax_count", args.absmax_count, blocks.count);
    check_buffer(op, "codes", args.codes, args.count);
    check_buffer(op, "absmax", args.absmax, blocks.count);
    check_buffer(op, "codebook", args.codebook, 256);
    check_buffer(op, "out", args.out, args.count);
    const KernelTable& table = active_table();
    for_each_range(executor, blocks.count, blocks.grain, [&](int64_t begin, int64_t end) {
      table.blockwise_dequantize(args, begin, end);
    });
  });
}
