// feinwerk_square_sum: validates the list, splits the rows, adds the integers of all tasks.
#include <algorithm>
#include <atomic>

#include "core/dispatch.h"
#include "core/parallel.h"
#include "core/status.h"
#include "core/validate.h"

using namespace feinwerk;

feinwerk_status feinwerk_square_sum(const feinwerk_square_sum_args* arguments,
                                    const feinwerk_executor* executor) {
  constexpr const char* op = "square_sum";
  constexpr int64_t kUnitElements = 1 << 16;
  return guarded([&] {
    const auto& args = required(op, arguments);
    if (args.tensor_count < 0) invalid(op, "tensor_count", "be at least 0", args.tensor_count);
    check_buffer(op, "tensors", args.tensors, args.tensor_count);
    check_count(op, "limb_count", args.limb_count, FEINWERK_SQUARE_SUM_LENGTH);
    check_buffer(op, "limbs", args.limbs, args.limb_count);
    ItemRanges ranges;
    for (int64_t i = 0; i < args.tensor_count; ++i) {
      const feinwerk_rows& rows = args.tensors[i];
      check_dtype(op, "dtype", rows.dtype);
      check_buffer(op, "data", rows.data, checked_product(op, "rows * cols", rows.rows, rows.cols));
      ranges.add(rows.rows, std::max<int64_t>(1, kUnitElements / std::max<int64_t>(1, rows.cols)));
    }
    const KernelTable& table = active_table();
    std::atomic<int64_t> totals[FEINWERK_SQUARE_SUM_LENGTH] = {};
    ranges.for_each(executor, [&](int64_t i, int64_t begin, int64_t end) {
      int64_t limbs[FEINWERK_SQUARE_SUM_LENGTH] = {};
      table.square_sum(args.tensors[i], begin, end, limbs);
      for (int j = 0; j < FEINWERK_SQUARE_SUM_LENGTH; ++j)
        if (limbs[j]) totals[j].fetch_add(limbs[j], std::memory_order_relaxed);
    });
    for (int i = 0; i < FEINWERK_SQUARE_SUM_LENGTH; ++i) args.limbs[i] = totals[i];
  });
}
