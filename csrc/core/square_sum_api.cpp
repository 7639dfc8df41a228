// feinwerk_square_sum: validates the list, splits the rows, adds the integers of all tasks.
#include <algorithm>
#include <atomic>
#include <vector>

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
    struct Work {
      int64_t grain, first_unit;
    };
    std::vector<Work> work;
    int64_t units = 0;
    for (int64_t i = 0; i < args.tensor_count; ++i) {
      const feinwerk_rows& rows = args.tensors[i];
      check_dtype(op, "dtype", rows.dtype);
      check_buffer(op, "data", rows.data, checked_product(op, "rows * cols", rows.rows, rows.cols));
      const int64_t grain = std::max<int64_t>(1, kUnitElements / std::max<int64_t>(1, rows.cols));
      work.push_back({grain, units});
      units += ceil_div(rows.rows, grain);
    }
    const KernelTable& table = active_table();
    std::atomic<int64_t> totals[FEINWERK_SQUARE_SUM_LENGTH] = {};
    for_each_unit(executor, units, [&](int64_t unit, int64_t) {
      const auto after =
          std::upper_bound(work.begin(), work.end(), unit,
                           [](int64_t wanted, const Work& w) { return wanted < w.first_unit; });
      const Work& w = *(after - 1);
      const feinwerk_rows& rows = args.tensors[after - 1 - work.begin()];
      const int64_t begin = (unit - w.first_unit) * w.grain;
      int64_t limbs[FEINWERK_SQUARE_SUM_LENGTH] = {};
      table.square_sum(rows, begin, std::min(rows.rows, begin + w.grain), limbs);
      for (int i = 0; i < FEINWERK_SQUARE_SUM_LENGTH; ++i)
        if (limbs[i]) totals[i].fetch_add(limbs[i], std::memory_order_relaxed);
    });
    for (int i = 0; i < FEINWERK_SQUARE_SUM_LENGTH; ++i) args.limbs[i] = totals[i];
  });
}
