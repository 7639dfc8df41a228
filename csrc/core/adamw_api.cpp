// feinwerk_adamw_step: validates the list, finds the scalars of every step, splits the work.
#include <algorithm>
#include <cmath>
#include <string>
#include <vector>

#include "core/dispatch.h"
#include "core/dynamic_map.h"
#include "core/parallel.h"
#include "core/status.h"
#include "core/validate.h"

using namespace feinwerk;

namespace {

constexpr const char* kOp = "adamw_step";
constexpr int64_t kUnitElements = 1 << 15;
constexpr int64_t kMost = (int64_t{1} << 31) - 1;

void check_options(const feinwerk_adamw_step_args& args) {
  const auto choice = [](const char* name, int64_t value) {
    if (value < 0 || value > 2) invalid(kOp, name, "be 0, 1 or 2", value);
  };
  choice("master", args.master);
  choice("state", args.state);
  check_dtype(kOp, "grad_dtype", args.grad_dtype);
  if (args.blocksize < 1) invalid(kOp, "blocksize", "be positive", args.blocksize);
  if (args.tensor_count < 0) invalid(kOp, "tensor_count", "be at least 0", args.tensor_count);
  check_buffer(kOp, "tensors", args.tensors, args.tensor_count);
  const auto number = [](const char* name, bool good, double value) {
    if (!good)
      throw Failure{
          FEINWERK_INVALID_ARGUMENT,
          std::string(kOp) + ": " + name + " must be in its range, got " + std::to_string(value)};
  };
  number("lr", args.lr >= 0 && std::isfinite(args.lr), args.lr);
  number("beta1", args.beta1 >= 0 && args.beta1 < 1, args.beta1);
  number("beta2", args.beta2 >= 0 && args.beta2 < 1, args.beta2);
  number("eps", args.eps > 0 && std::isfinite(args.eps), args.eps);
  number("weight_decay", args.weight_decay >= 0 && std::isfinite(args.weight_decay),
         args.weight_decay);
}

// How many elements, or blocks of codes, the parameter has.
int64_t check_tensor(const feinwerk_adamw_step_args& args, const feinwerk_adamw_tensor& tensor) {
  const int64_t count = checked_product(kOp, "rows * cols", tensor.rows, tensor.cols);
  const bool coded = args.state == FEINWERK_STATE_DYNAMIC8;
  const int64_t blocks = coded ? tensor.rows * ceil_div(tensor.cols, args.blocksize) : 0;
  check_count(kOp, "absmax_count", tensor.absmax_count, blocks);
  if (tensor.step < 1 || tensor.step > kMost) invalid(kOp, "step", "be in [1, 2^31)", tensor.step);
  if (tensor.parameter < 0 || tensor.parameter > kMost)
    invalid(kOp, "parameter", "be in [0, 2^31)", tensor.parameter);
  if (tensor.first_element < 0)
    invalid(kOp, "first_element", "be at least 0", tensor.first_element);
  check_buffer(kOp, "param", tensor.param, count);
  check_buffer(kOp, "grad", tensor.grad, count);
  check_buffer(kOp, "exp_avg", tensor.exp_avg, count);
  check_buffer(kOp, "exp_avg_sq", tensor.exp_avg_sq, count);
  check_buffer(kOp, "exp_avg_absmax", tensor.exp_avg_absmax, blocks);
  check_buffer(kOp, "exp_avg_sq_absmax", tensor.exp_avg_sq_absmax, blocks);
  if (args.master == FEINWERK_MASTER_REMAINDER)
    check_buffer(kOp, "remainder", tensor.remainder, count);
  return coded ? blocks : count;
}

AdamwScalars scalars_of(const feinwerk_adamw_step_args& args, int64_t step) {
  const auto narrow = [](double x) { return static_cast<float>(x); };
  const double t = static_cast<double>(step);
  return {args.grad_factor,
          narrow(1 - args.beta1),
          narrow(args.beta2),
          narrow(1 - args.beta2),
          narrow(args.eps),
          narrow(1 - args.lr * args.weight_decay),
          narrow(args.lr / (1 - std::pow(args.beta1, t))),
          narrow(1 / std::sqrt(1 - std::pow(args.beta2, t)))};
}

}  // namespace

feinwerk_status feinwerk_adamw_step(const feinwerk_adamw_step_args* arguments,
                                    const feinwerk_executor* executor) {
  return guarded([&] {
    const auto& args = required(kOp, arguments);
    check_options(args);
    ItemRanges ranges;
    std::vector<AdamwScalars> scalars;
    for (int64_t i = 0; i < args.tensor_count; ++i) {
      const auto& tensor = args.tensors[i];
      const int64_t pieces = check_tensor(args, tensor);
      const int64_t elements = args.state == FEINWERK_STATE_DYNAMIC8
                                   ? std::min(args.blocksize, std::max<int64_t>(1, tensor.cols))
                                   : 1;
      ranges.add(pieces, std::max<int64_t>(1, kUnitElements / elements));
      scalars.push_back(scalars_of(args, tensor.step));
    }
    const KernelTable& table = active_table();
    const DynamicMap(&maps)[2] = dynamic_maps();
    ranges.for_each(executor, [&](int64_t i, int64_t begin, int64_t end) {
      table.adamw_step(args, args.tensors[i], scalars[static_cast<size_t>(i)], maps, begin, end);
    });
  });
}
