// Everything wrong in a call of adamw_step or square_sum; part of test_abi.
#include <math.h>
#include <string.h>

#include "errors.h"

enum { kAbsmax = kRows * 1 };

static float params[kCount], grads[kCount], first[kCount], second[kCount];
static float first_absmax[kAbsmax], second_absmax[kAbsmax];
static int16_t remainders[kCount];

static feinwerk_adamw_tensor good_tensor(void) {
  return (feinwerk_adamw_tensor){.param = params,
                                 .remainder = remainders,
                                 .grad = grads,
                                 .exp_avg = first,
                                 .exp_avg_sq = second,
                                 .exp_avg_absmax = first_absmax,
                                 .exp_avg_sq_absmax = second_absmax,
                                 .rows = kRows,
                                 .cols = kCols,
                                 .step = 1};
}

static feinwerk_adamw_step_args good_args(const feinwerk_adamw_tensor* tensors, int64_t count) {
  return (feinwerk_adamw_step_args){.tensors = tensors,
                                    .tensor_count = count,
                                    .blocksize = 64,
                                    .lr = 1e-3,
                                    .beta1 = 0.9,
                                    .beta2 = 0.999,
                                    .eps = 1e-8,
                                    .weight_decay = 0.01,
                                    .grad_factor = 1};
}

// The second of two tensors is broken: nothing of the first may have been written.
#define BREAK_TENSOR(field, value, message)                             \
  do {                                                                  \
    feinwerk_adamw_tensor pair[2] = {good, good};                       \
    pair[1].field = value;                                              \
    args.tensors = pair;                                                \
    params[0] = 7;                                                      \
    expect(__LINE__, FEINWERK_INVALID_ARGUMENT, "adamw_step: " message, \
           feinwerk_adamw_step(&args, NULL));                           \
    CHECK(params[0] == 7);                                              \
  } while (0)

static void test_tensor_errors(feinwerk_adamw_tensor good, feinwerk_adamw_step_args args) {
  args.tensor_count = 2;
  BREAK_TENSOR(param, NULL, "param must not be null for 300 elements");
  BREAK_TENSOR(grad, NULL, "grad must not be null for 300 elements");
  BREAK_TENSOR(exp_avg, NULL, "exp_avg must not be null for 300 elements");
  BREAK_TENSOR(exp_avg_sq, NULL, "exp_avg_sq must not be null for 300 elements");
  BREAK_TENSOR(rows, -1, "rows * cols must not be negative, got -1");
  BREAK_TENSOR(cols, -2, "rows * cols must not be negative, got -2");
  BREAK_TENSOR(rows, INT64_MAX, "rows * cols must stay below 2^62");
  BREAK_TENSOR(step, 0, "step must be in [1, 2^31), got 0");
  BREAK_TENSOR(step, (int64_t)1 << 31, "step must be in [1, 2^31), got 2147483648");
  BREAK_TENSOR(parameter, -1, "parameter must be in [0, 2^31), got -1");
  BREAK_TENSOR(parameter, (int64_t)1 << 31, "parameter must be in [0, 2^31)");
  BREAK_TENSOR(first_element, -1, "first_element must be at least 0, got -1");
}

void test_adamw_errors(void) {
  feinwerk_adamw_tensor tensor = good_tensor();
  const feinwerk_adamw_step_args good = good_args(&tensor, 1);
  ACCEPTS(feinwerk_adamw_step(&good, NULL));
  expect(__LINE__, FEINWERK_INVALID_ARGUMENT, "adamw_step: args must not be null, got null",
         feinwerk_adamw_step(NULL, NULL));
  const volatile double zero = 0;
  const double nothing = zero / zero, infinite = 1 / zero;
#define BREAK(field, value, message) REJECTS(adamw_step, good, field, value, message)
  BREAK(tensors, NULL, "tensors must not be null for 1 elements");
  BREAK(tensor_count, -1, "tensor_count must be at least 0, got -1");
  BREAK(master, (feinwerk_master)3, "master must be 0, 1 or 2, got 3");
  BREAK(master, (feinwerk_master)-1, "master must be 0, 1 or 2, got ");
  BREAK(state, (feinwerk_state)9, "state must be 0, 1 or 2, got 9");
  BREAK(grad_dtype, (feinwerk_dtype)3, "grad_dtype must be float32 (0)");
  BREAK(blocksize, 0, "blocksize must be positive, got 0");
  BREAK(blocksize, INT64_MIN, "blocksize must be positive");
  BREAK(lr, -1, "lr must be in its range");
  BREAK(lr, nothing, "lr must be in its range");
  BREAK(lr, infinite, "lr must be in its range");
  BREAK(weight_decay, -1, "weight_decay must be in its range");
  BREAK(beta1, 1, "beta1 must be in its range");
  BREAK(beta1, -0.1, "beta1 must be in its range");
  BREAK(beta2, 1, "beta2 must be in its range");
  BREAK(beta2, nothing, "beta2 must be in its range");
  BREAK(eps, 0, "eps must be in its range");
  BREAK(eps, infinite, "eps must be in its range");
#undef BREAK
  test_tensor_errors(tensor, good);

  feinwerk_adamw_step_args args = good;
  args.master = FEINWERK_MASTER_REMAINDER;
  test_tensor_errors(tensor, args);
  args.tensor_count = 2;
  {
    const feinwerk_adamw_tensor good = tensor;
    BREAK_TENSOR(remainder, NULL, "remainder must not be null for 300 elements");
    args.master = FEINWERK_MASTER_FLOAT32;
    BREAK_TENSOR(absmax_count, kAbsmax, "absmax_count must be 0, got 6");
  }
  args.state = FEINWERK_STATE_DYNAMIC8;
  tensor.absmax_count = kAbsmax;
  test_tensor_errors(tensor, args);
  {
    const feinwerk_adamw_tensor good = tensor;
    BREAK_TENSOR(absmax_count, kAbsmax - 1, "absmax_count must be 6, got 5");
    BREAK_TENSOR(exp_avg_absmax, NULL, "exp_avg_absmax must not be null for 6 elements");
    BREAK_TENSOR(exp_avg_sq_absmax, NULL, "exp_avg_sq_absmax must not be null for 6 elements");
    args.blocksize = 49;
    BREAK_TENSOR(rows, kRows, "absmax_count must be 12, got 6");
  }
  const feinwerk_adamw_step_args none = good_args(NULL, 0);
  ACCEPTS(feinwerk_adamw_step(&none, NULL));
  const feinwerk_adamw_tensor empty = {.rows = 0, .cols = 5, .step = 1};
  args = good_args(&empty, 1);
  for (int state = 0; state < 3; ++state) {
    args.state = (feinwerk_state)state;
    ACCEPTS(feinwerk_adamw_step(&args, NULL));
  }
}

void test_square_sum_errors(void) {
  int64_t limbs[FEINWERK_SQUARE_SUM_LENGTH];
  feinwerk_rows pair[2] = {{grads, FEINWERK_FLOAT32, kRows, kCols},
                           {grads, FEINWERK_FLOAT32, kRows, kCols}};
  const feinwerk_square_sum_args good = {pair, 2, limbs, FEINWERK_SQUARE_SUM_LENGTH};
  ACCEPTS(feinwerk_square_sum(&good, NULL));
  expect(__LINE__, FEINWERK_INVALID_ARGUMENT, "square_sum: args must not be null, got null",
         feinwerk_square_sum(NULL, NULL));
  REJECTS(square_sum, good, tensors, NULL, "tensors must not be null for 2 elements");
  REJECTS(square_sum, good, tensor_count, -1, "tensor_count must be at least 0, got -1");
  REJECTS(square_sum, good, limbs, NULL, "limbs must not be null for 22 elements");
  REJECTS(square_sum, good, limb_count, 21, "limb_count must be 22, got 21");
#define BREAK_ROWS(field, value, message)                               \
  do {                                                                  \
    const feinwerk_rows rows = pair[1];                                 \
    pair[1].field = value;                                              \
    limbs[0] = 7;                                                       \
    expect(__LINE__, FEINWERK_INVALID_ARGUMENT, "square_sum: " message, \
           feinwerk_square_sum(&good, NULL));                           \
    CHECK(limbs[0] == 7);                                               \
    pair[1] = rows;                                                     \
  } while (0)
  BREAK_ROWS(data, NULL, "data must not be null for 300 elements");
  BREAK_ROWS(dtype, (feinwerk_dtype)3, "dtype must be float32 (0)");
  BREAK_ROWS(rows, -1, "rows * cols must not be negative, got -1");
  BREAK_ROWS(cols, -2, "rows * cols must not be negative, got -2");
  BREAK_ROWS(rows, INT64_MAX, "rows * cols must stay below 2^62");
#undef BREAK_ROWS
  const feinwerk_square_sum_args none = {NULL, 0, limbs, FEINWERK_SQUARE_SUM_LENGTH};
  ACCEPTS(feinwerk_square_sum(&none, NULL));
  for (int i = 0; i < FEINWERK_SQUARE_SUM_LENGTH; ++i) CHECK(limbs[i] == 0);
}
