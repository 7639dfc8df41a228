// Lists of parameters, stepped by the C ABI and by plain C, serially and through the executor; and
// the sums of squares of their gradients.
#include "adamw_cases.h"

#include <math.h>
#include <string.h>

enum { kTensors = 4, kSteps = 2 };

static const char* const kNames[3][3] = {
    {"adamw_step (fp32)", "adamw_step (fp32, bf16 states)", "adamw_step (fp32, 8-bit)"},
    {"adamw_step (remainder)", "adamw_step (remainder, bf16 states)",
     "adamw_step (remainder, 8-bit)"},
    {"adamw_step (stochastic)", "adamw_step (stochastic, bf16 states)",
     "adamw_step (stochastic, 8-bit)"}};

static int64_t count_of(const feinwerk_adamw_tensor* tensor) { return tensor->rows * tensor->cols; }

static size_t param_size(const feinwerk_adamw_step_args* args) {
  return args->master == FEINWERK_MASTER_FLOAT32 ? 4 : 2;
}
static size_t state_size(const feinwerk_adamw_step_args* args) {
  static const size_t sizes[] = {4, 2, 1};
  return sizes[args->state];
}

// Gradients with an odd number here and there.
static void* gradients(context* run, int64_t count, feinwerk_dtype dtype) {
  static const float odd[] = {0.0f,   -0.0f, 1e-45f,   -3e-42f,   1e-30f, 1e18f,
                              -1e20f, 3e38f, INFINITY, -INFINITY, NAN};
  void* values = random_values(run, count, dtype);
  for (int64_t i = 0; i < count; ++i)
    if (below(run, 200) == 0) plain_store(values, dtype, i, odd[below(run, 11)]);
  return values;
}

static feinwerk_adamw_tensor random_tensor(context* run, const feinwerk_adamw_step_args* args,
                                           int64_t rows, int64_t cols) {
  const int64_t count = rows * cols;
  const int coded = args->state == FEINWERK_STATE_DYNAMIC8;
  feinwerk_adamw_tensor tensor = {.rows = rows,
                                  .cols = cols,
                                  .step = 1 + below(run, below(run, 2) ? 5 : 2000000000),
                                  .parameter = below(run, (int64_t)1 << 31),
                                  .first_element = below(run, (int64_t)1 << below(run, 40))};
  tensor.absmax_count = coded ? rows * (cols / args->blocksize + (cols % args->blocksize != 0)) : 0;
  tensor.param = take(run, count, param_size(args));
  tensor.exp_avg = take(run, count, state_size(args));
  tensor.exp_avg_sq = take(run, count, state_size(args));
  if (args->master == FEINWERK_MASTER_REMAINDER) tensor.remainder = take(run, count, 2);
  if (coded) {
    tensor.exp_avg_absmax = take(run, tensor.absmax_count, 4);
    tensor.exp_avg_sq_absmax = take(run, tensor.absmax_count, 4);
  }
  const feinwerk_dtype dtype =
      args->master == FEINWERK_MASTER_FLOAT32 ? FEINWERK_FLOAT32 : FEINWERK_BFLOAT16;
  for (int64_t i = 0; i < count; ++i) {
    plain_store(tensor.param, dtype, i, 2 * uniform(run));
    if (tensor.remainder) tensor.remainder[i] = (int16_t)(below(run, 65536) - 32768);
    if (coded) {
      ((uint8_t*)tensor.exp_avg)[i] = (uint8_t)below(run, 256);
      ((uint8_t*)tensor.exp_avg_sq)[i] = (uint8_t)below(run, 256);
    } else {
      plain_store(tensor.exp_avg, (feinwerk_dtype)args->state, i, uniform(run));
      plain_store(tensor.exp_avg_sq, (feinwerk_dtype)args->state, i, fabsf(uniform(run)));
    }
  }
  for (int64_t b = 0; b < tensor.absmax_count; ++b) {
    tensor.exp_avg_absmax[b] = below(run, 8) ? fabsf(uniform(run)) : 0;
    tensor.exp_avg_sq_absmax[b] = below(run, 8) ? fabsf(uniform(run)) : 1e-30f;
  }
  return tensor;
}

static void* copy_of(context* run, const void* from, int64_t count, size_t size) {
  if (!from) return NULL;
  void* to = take(run, count, size);
  memcpy(to, from, (size_t)count * size);
  return to;
}

static void copy_tensor(context* run, const feinwerk_adamw_step_args* args,
                        const feinwerk_adamw_tensor* from, feinwerk_adamw_tensor* to) {
  const int64_t count = count_of(from);
  *to = *from;
  to->param = copy_of(run, from->param, count, param_size(args));
  to->remainder = copy_of(run, from->remainder, count, 2);
  to->exp_avg = copy_of(run, from->exp_avg, count, state_size(args));
  to->exp_avg_sq = copy_of(run, from->exp_avg_sq, count, state_size(args));
  to->exp_avg_absmax = copy_of(run, from->exp_avg_absmax, from->absmax_count, 4);
  to->exp_avg_sq_absmax = copy_of(run, from->exp_avg_sq_absmax, from->absmax_count, 4);
}

// Which NaN it is stays open.
static void same_values(context* run, const char* what, const void* got, const void* want,
                        feinwerk_dtype dtype, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    const float a = plain_load(got, dtype, i), b = plain_load(want, dtype, i);
    if (memcmp(&a, &b, sizeof a) != 0 && !(isnan(a) && isnan(b))) fail(run, what, i, a, b);
  }
}

static void same_tensor(context* run, const feinwerk_adamw_step_args* args,
                        const feinwerk_adamw_tensor* got, const feinwerk_adamw_tensor* want) {
  const int64_t count = count_of(got);
  const int narrow = args->master != FEINWERK_MASTER_FLOAT32;
  same_values(run, "param", got->param, want->param, narrow ? FEINWERK_BFLOAT16 : FEINWERK_FLOAT32,
              count);
  if (got->remainder) same_bytes(run, "remainder", got->remainder, want->remainder, 2 * count);
  if (args->state == FEINWERK_STATE_DYNAMIC8) {
    same_bytes(run, "exp_avg", got->exp_avg, want->exp_avg, count);
    same_bytes(run, "exp_avg_sq", got->exp_avg_sq, want->exp_avg_sq, count);
    const int64_t bytes = 4 * got->absmax_count;
    same_bytes(run, "exp_avg_absmax", got->exp_avg_absmax, want->exp_avg_absmax, bytes);
    same_bytes(run, "exp_avg_sq_absmax", got->exp_avg_sq_absmax, want->exp_avg_sq_absmax, bytes);
  } else {
    const feinwerk_dtype dtype = (feinwerk_dtype)args->state;
    same_values(run, "exp_avg", got->exp_avg, want->exp_avg, dtype, count);
    same_values(run, "exp_avg_sq", got->exp_avg_sq, want->exp_avg_sq, dtype, count);
  }
}

static void check_list(context* run, feinwerk_master master, feinwerk_state state) {
  const test_case* test = run->test;
  const int64_t blocksizes[] = {test->blocksize, 1 + below(run, 300), 1, 64, INT64_MAX};
  feinwerk_adamw_step_args args = {.tensor_count = kTensors,
                                   .master = master,
                                   .grad_dtype = test->dtype,
                                   .state = state,
                                   .blocksize = blocksizes[below(run, 5)],
                                   .lr = below(run, 4) ? 1e-3 * (double)(1 + below(run, 99)) : 0,
                                   .beta1 = below(run, 4) ? 0.9 : 0,
                                   .beta2 = below(run, 4) ? 0.999 : 0,
                                   .eps = 1e-8,
                                   .weight_decay = 0.01 * (double)below(run, 30),
                                   .grad_factor = uniform(run),
                                   .seed = next_random(&run->random)};
  // Large matrices lose rows: plain C is slow, and an emulator slower.
  const int64_t most = 4000,
                rows = test->k > 0 && test->n > most / test->k ? most / test->k : test->n;
  const int64_t shapes[kTensors][2] = {
      {rows, test->k}, {1, test->m}, {0, 5}, {1, 1 + below(run, 2500)}};
  feinwerk_adamw_tensor tensors[3][kTensors];  // the executor's, plain C's, without an executor
  for (int i = 0; i < kTensors; ++i) {
    tensors[0][i] = random_tensor(run, &args, shapes[i][0], shapes[i][1]);
    copy_tensor(run, &args, &tensors[0][i], &tensors[1][i]);
    copy_tensor(run, &args, &tensors[0][i], &tensors[2][i]);
  }
  run->step = kNames[master][state];
  for (int step = 0; step < kSteps; ++step) {
    for (int i = 0; i < kTensors; ++i) {
      const void* grad = gradients(run, count_of(&tensors[0][i]), test->dtype);
      for (int j = 0; j < 3; ++j) {
        tensors[j][i].grad = grad;
        tensors[j][i].step += step > 0;
      }
    }
    args.tensors = tensors[0];
    expect_ok(run, feinwerk_adamw_step(&args, &run->executor));
    args.tensors = tensors[1];
    plain_adamw_step(&args);
    args.tensors = tensors[2];
    expect_ok(run, feinwerk_adamw_step(&args, NULL));
    for (int i = 0; i < kTensors; ++i) {
      same_tensor(run, &args, &tensors[0][i], &tensors[1][i]);
      same_tensor(run, &args, &tensors[2][i], &tensors[1][i]);
    }
  }
}

void check_square_sum(context* run) {
  const int own = run->buffer_count;
  const test_case* test = run->test;
  const int64_t shapes[][2] = {
      {test->m, test->k}, {test->n, 1}, {0, 7}, {3, 0}, {2, 1 + below(run, 5000)}};
  enum { kShapes = sizeof shapes / sizeof shapes[0] };
  feinwerk_rows tensors[kShapes];
  int64_t want[FEINWERK_SQUARE_SUM_LENGTH] = {0};
  for (int i = 0; i < kShapes; ++i) {
    const feinwerk_dtype dtype = i == 1 ? FEINWERK_FLOAT32 : test->dtype;
    const int64_t count = shapes[i][0] * shapes[i][1];
    tensors[i] = (feinwerk_rows){gradients(run, count, dtype), dtype, shapes[i][0], shapes[i][1]};
    plain_square_sum(&tensors[i], want);
  }
  run->step = "square_sum";
  for (int serial = 0; serial < 2; ++serial) {
    int64_t* limbs = take(run, FEINWERK_SQUARE_SUM_LENGTH, sizeof *limbs);
    const feinwerk_square_sum_args args = {tensors, kShapes, limbs, FEINWERK_SQUARE_SUM_LENGTH};
    expect_ok(run, feinwerk_square_sum(&args, serial ? NULL : &run->executor));
    same_bytes(run, "limbs", limbs, want, sizeof want);
  }
  free_buffers(run, own);
}

void check_adamw(context* run) {
  const int own = run->buffer_count;
  for (int master = 0; master < 3; ++master) {
    for (int state = 0; state < 3; ++state) {
      check_list(run, (feinwerk_master)master, (feinwerk_state)state);
      free_buffers(run, own);
    }
  }
}
