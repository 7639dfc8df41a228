// One case of the adapter operations: random adapters over random rows, forward and backward, every
// output wanted or not, on exact buffers.
#include "adapter_cases.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

enum { kMaxAdapters = 4 };

// What is asked of grad_magnitude: zeros and a large bias are where y does not give it.
typedef enum difficulty { kOrdinary, kZeroMagnitudes, kLargeBias } difficulty;

// One call and what it is compared with.
typedef struct call {
  feinwerk_lora_linear_args forward;
  feinwerk_adapter adapters[kMaxAdapters];
  const double* weight;              // W~ in doubles
  plain_result norms[kMaxAdapters];  // || W~ + s B A ||, where it was wanted
  double* crosses[kMaxAdapters];
  int64_t widest;
  difficulty difficulty;
} call;

static plain_result take_result(context* run, int64_t count) {
  return (plain_result){take(run, count, sizeof(double)), take(run, count, sizeof(double))};
}

static void* copied(context* run, const void* from, int64_t count, size_t size) {
  return memcpy(take(run, count, size), from, (size_t)count * size);
}

static int finds_norm(const feinwerk_adapter* adapter) {
  return adapter->weight_norm && !adapter->weight_norm_known;
}

// Where the bf16 instructions multiply.
static int has_bf16_products(const context* run) {
  return run->test->dtype == FEINWERK_BFLOAT16 &&
         (strcmp(run->isa, "avx512_bf16") == 0 || strcmp(run->isa, "amx") == 0);
}

static int64_t random_rank(context* run) {
  const int64_t kind = below(run, 64);
  return kind == 0 ? 257 + below(run, 44) : kind < 4 ? 65 + below(run, 66) : 1 + below(run, 40);
}

// Ascending row ranges with gaps; some are empty, and a single one often has all rows.
static void random_rows(context* run, feinwerk_adapter* adapters, int64_t count) {
  const int64_t m = run->test->m, part = count > 0 && m > count ? m / count : 1;
  int64_t at = 0;
  for (int64_t e = 0; e < count; ++e) {
    const int whole = below(run, 2) == 0;
    int64_t gap = below(run, 3) == 0 ? below(run, part + 1) : 0;
    int64_t rows = below(run, 6) == 0 ? 0 : 1 + below(run, 2 * part);
    if (count == 1 && whole) gap = 0;
    if (e + 1 == count && whole) rows = m;
    at = at + gap < m ? at + gap : m;
    adapters[e].row_begin = at;
    at = at + rows < m ? at + rows : m;
    adapters[e].row_end = at;
  }
}

// DoRA's vectors, or where to write norms that nobody divides by.
static void random_norms(context* run, call* to, int64_t e, int dora) {
  const int64_t n = run->test->n, k = run->test->k;
  feinwerk_adapter* adapter = to->adapters + e;
  if (!dora && below(run, 4) != 0) return;
  to->norms[e] = take_result(run, n);
  to->crosses[e] = take(run, n, sizeof(double));
  plain_weight_norm(adapter, to->weight, n, k, to->norms[e], to->crosses[e]);
  float *magnitude = take(run, n, 4), *norm = take(run, n, 4), *base = take(run, n, 4);
  const int known = dora && below(run, 3) == 0;
  for (int64_t i = 0; i < n; ++i) {
    double square = 0;
    for (int64_t c = 0; c < k; ++c) square += to->weight[i * k + c] * to->weight[i * k + c];
    base[i] = (float)sqrt(square);
    const float found = (float)to->norms[e].value[i];
    magnitude[i] = found > 0 ? found * (1 + uniform(run) / 2) : 1;
    if (below(run, 16) == 0) magnitude[i] = -magnitude[i];
    if (known) norm[i] = below(run, 32) == 0 ? 0 : found * (1 + uniform(run) / 4);
  }
  if (n > 0 && to->difficulty == kZeroMagnitudes) magnitude[below(run, n)] = 0;
  adapter->weight_norm = norm;
  adapter->weight_norm_known = known;
  adapter->base_norm = known ? NULL : base;
  adapter->magnitude = dora ? magnitude : NULL;
}

// Small, as A is: float16 has to hold the sums that it makes.
static float* random_A(context* run, int64_t count) {
  float* A = random_values(run, count, FEINWERK_FLOAT32);
  for (int64_t i = 0; i < count; ++i) A[i] /= 8;
  return A;
}

static void random_adapters(context* run, call* to) {
  const int64_t n = run->test->n, k = run->test->k, count = below(run, kMaxAdapters + 1);
  const int64_t kind = below(run, 3);  // all of one kind, or mixed
  memset(to->adapters, 0, sizeof to->adapters);
  random_rows(run, to->adapters, count);
  to->widest = 0;
  for (int64_t e = 0; e < count; ++e) {
    feinwerk_adapter* adapter = to->adapters + e;
    adapter->r = e == 0 && run->test->rank > 0 ? run->test->rank : random_rank(run);
    adapter->lora_A = random_A(run, adapter->r * k);
    adapter->lora_B = random_values(run, n * adapter->r, FEINWERK_FLOAT32);
    adapter->scaling = below(run, 16) == 0 ? 0 : uniform(run);
    random_norms(run, to, e, kind == 2 ? below(run, 2) == 0 : kind == 1);
    if (adapter->r > to->widest) to->widest = adapter->r;
  }
  to->forward.adapters = to->adapters;
  to->forward.adapter_count = count;
  to->forward.s_cols = count > 0 ? to->widest + below(run, 3) : 0;
}

static void random_dropout(context* run, feinwerk_dropout* dropout) {
  static const double probabilities[] = {0, 0, 0.05, 0.5, 0.9};
  const double p = probabilities[below(run, 5)];
  dropout->seed = next_random(&run->random);
  dropout->drop_below = (uint32_t)rint(p * 0x1p32);
  dropout->keep_scale = (float)(1 / (1 - p));
}

static void random_bias(context* run, call* to) {
  feinwerk_lora_linear_args* args = &to->forward;
  args->bias_dtype = kDtypes[below(run, 3)];
  if (to->difficulty != kLargeBias) {
    if (below(run, 3) != 0) args->bias = random_values(run, run->test->n, args->bias_dtype);
    return;
  }
  // Beyond what its dtype's digits leave of the rest, and below what overflows float16.
  args->bias_dtype = args->dtype;
  void* bias = take(run, run->test->n, plain_size(args->dtype));
  const float size = args->dtype == FEINWERK_FLOAT32 ? 0x1p30f : 0x1.8p15f;
  for (int64_t i = 0; i < run->test->n; ++i)
    plain_store(bias, args->dtype, i, below(run, 2) ? size : -size);
  args->bias = bias;
}

static void check_norms(context* run, const call* made, const float* const* before) {
  const int64_t n = run->test->n;
  for (int64_t e = 0; e < made->forward.adapter_count; ++e) {
    const feinwerk_adapter* adapter = made->adapters + e;
    if (!adapter->weight_norm) continue;
    if (!finds_norm(adapter)) {
      same_bytes(run, "weight_norm (known)", adapter->weight_norm, before[e], n * 4);
      continue;
    }
    if (adapter->scaling == 0)  // no change: the gain is exactly what it is without one
      same_bytes(run, "weight_norm (no change)", adapter->weight_norm, adapter->base_norm, n * 4);
    double* budget = take(run, n, sizeof(double));
    for (int64_t i = 0; i < n; ++i) {
      // Of the square; A in two halves of 8 bits each leaves 2^-18 of its products with W.
      double error = sum_error(run->test->k + adapter->r, made->norms[e].size[i]);
      if (has_bf16_products(run)) error += 0x1p-18 * made->crosses[e][i];
      const double norm = made->norms[e].value[i];
      budget[i] = norm > 0 ? fmin(error / norm, sqrt(error)) : sqrt(error);
    }
    check_values(run, "weight_norm", adapter->weight_norm, FEINWERK_FLOAT32, made->norms[e].value,
                 budget, n);
  }
}

static void run_forward(context* run, feinwerk_lora_linear_args* args,
                        const feinwerk_executor* executor) {
  expect_ok(run, feinwerk_lora_linear_workspace(args, executor ? executor->threads : 1,
                                                &args->workspace_bytes));
  args->workspace = take_workspace(run, args->workspace_bytes);
  expect_ok(run, feinwerk_lora_linear(args, executor));
}

static const feinwerk_adapter* adapter_of_row(const call* made, int64_t row) {
  for (int64_t e = 0; e < made->forward.adapter_count; ++e)
    if (row >= made->adapters[e].row_begin && row < made->adapters[e].row_end)
      return made->adapters + e;
  return NULL;
}

// S where an adapter has rows and ranks; elsewhere nothing may be written.
static void check_s(context* run, const call* made, plain_result want) {
  const int64_t m = run->test->m, cols = made->forward.s_cols, k = run->test->k;
  double* budget = take(run, cols, sizeof(double));
  for (int64_t row = 0; row < m; ++row) {
    const feinwerk_adapter* adapter = adapter_of_row(made, row);
    const int64_t r = adapter ? adapter->r : 0;
    const float* s = made->forward.s + row * cols;
    for (int64_t j = 0; j < r; ++j) budget[j] = sum_error(k, want.size[row * cols + j]);
    check_values(run, "s", s, FEINWERK_FLOAT32, want.value + row * cols, budget, r);
    for (int64_t j = r; j < cols; ++j) {
      uint32_t bits;
      memcpy(&bits, s + j, 4);
      if (bits != 0xffffffffu) fail(run, "s (unused)", row * cols + j, s[j], NAN);
    }
  }
}

static void check_forward(context* run, call* made) {
  const test_case* test = run->test;
  feinwerk_lora_linear_args* args = &made->forward;
  const int64_t m = test->m, n = test->n, count = args->adapter_count;
  const size_t size = plain_size(test->dtype);
  const float* before[kMaxAdapters];
  for (int64_t e = 0; e < count; ++e)
    before[e] =
        made->adapters[e].weight_norm ? copied(run, made->adapters[e].weight_norm, n, 4) : NULL;
  run_forward(run, args, &run->executor);
  check_norms(run, made, before);
  const plain_result y = take_result(run, m * n), s = take_result(run, m * args->s_cols);
  plain_lora_linear(args, made->weight, y, s);
  check_s(run, made, s);
  const int int8 = args->compute == FEINWERK_COMPUTE_INT8 && !args->weight.dense;
  const double* slack = int8 ? int8_slack(run, args->x, &args->weight.nf4, made->weight) : NULL;
  double* budget = take(run, m * n, sizeof(double));
  for (int64_t row = 0; row < m; ++row) {
    const feinwerk_adapter* adapter = adapter_of_row(made, row);
    for (int64_t i = 0; i < n; ++i) {
      const int64_t at = row * n + i;
      double gain = 1;
      if (adapter && adapter->magnitude && args->dropout.drop_below == 0)
        gain = adapter->weight_norm[i] == 0 ? 0 : adapter->magnitude[i] / adapter->weight_norm[i];
      budget[at] = sum_error(test->k + (adapter ? adapter->r : 0), y.size[at]) +
                   (slack ? fabs(gain) * slack[at] : 0);
    }
  }
  check_values(run, "y", args->y, test->dtype, y.value, budget, m * n);

  // The same bits without threads and with the norms known.
  feinwerk_adapter known[kMaxAdapters], alone[kMaxAdapters];
  memcpy(known, made->adapters, sizeof known);
  memcpy(alone, made->adapters, sizeof alone);
  for (int64_t e = 0; e < count; ++e) {
    known[e].weight_norm_known = 1;
    alone[e].row_begin = alone[e].row_end = 0;
    if (finds_norm(alone + e)) alone[e].weight_norm = take(run, n, 4);
  }
  feinwerk_lora_linear_args again = *args;
  again.adapters = known;
  again.y = take(run, m * n, size);
  again.s = take(run, m * args->s_cols, 4);
  run_forward(run, &again, NULL);
  same_bytes(run, "y (serial, norms known)", again.y, args->y, m * n * (int64_t)size);
  same_bytes(run, "s (serial, norms known)", again.s, args->s, m * args->s_cols * 4);
  // And the same norms without any rows.
  again.adapters = alone;
  again.m = 0;
  again.x = again.y = again.s = NULL;
  run_forward(run, &again, NULL);
  for (int64_t e = 0; e < count; ++e)
    if (alone[e].weight_norm)
      same_bytes(run, "weight_norm (no rows)", alone[e].weight_norm, made->adapters[e].weight_norm,
                 n * 4);
}

static void run_backward(context* run, feinwerk_lora_linear_backward_args* args,
                         const feinwerk_executor* executor) {
  expect_ok(run, feinwerk_lora_linear_backward_workspace(args, executor ? executor->threads : 1,
                                                         &args->workspace_bytes));
  args->workspace = take_workspace(run, args->workspace_bytes);
  expect_ok(run, feinwerk_lora_linear_backward(args, executor));
}

// One gradient in fp32: within its budget, and `more` where there is some.
static void check_gradient(context* run, const char* what, const float* got, plain_result want,
                           int64_t depth, const double* more, int64_t count) {
  double* budget = take(run, count, sizeof(double));
  for (int64_t i = 0; i < count; ++i)
    budget[i] = sum_error(depth, want.size[i]) + (more ? more[i] : 0);
  check_values(run, what, got, FEINWERK_FLOAT32, want.value, budget, count);
}

// Whether two runs gave the same bits; a null pointer was not wanted.
static void same_gradient(context* run, const char* what, const float* got, const float* want,
                          int64_t count) {
  if (got) same_bytes(run, what, got, want, count * 4);
}

static void check_backward(context* run, const call* made) {
  const test_case* test = run->test;
  const feinwerk_lora_linear_args* forward = &made->forward;
  const int64_t m = test->m, n = test->n, k = test->k, count = forward->adapter_count;
  const int64_t size = (int64_t)plain_size(test->dtype);
  feinwerk_adapter adapters[kMaxAdapters], some[kMaxAdapters];
  feinwerk_lora_linear_backward_args args = {
      .weight = forward->weight,
      .grad_y = random_values(run, m * n, test->dtype),
      .x = forward->x,
      .y = forward->y,
      .dtype = test->dtype,
      .m = m,
      .bias = forward->bias,
      .bias_dtype = forward->bias_dtype,
      .adapters = adapters,
      .adapter_count = count,
      .s = forward->s,
      .s_cols = forward->s_cols,
      .dropout = forward->dropout,
      .grad_x = take(run, m * k, (size_t)size),
      .grad_bias = take(run, n, 4),
  };
  plain_gradients want = {.x = take_result(run, m * k), .bias = take_result(run, n)};
  want.scaled = take(run, m * k, sizeof(double));
  memcpy(adapters, made->adapters, sizeof adapters);
  for (int64_t e = 0; e < count; ++e) {
    const int64_t r = adapters[e].r;
    adapters[e].weight_norm_known = 1;
    adapters[e].base_norm = NULL;
    adapters[e].grad_A = take(run, r * k, 4);
    adapters[e].grad_B = take(run, n * r, 4);
    adapters[e].grad_magnitude = take(run, n, 4);
    want.A[e] = take_result(run, r * k);
    want.B[e] = take_result(run, n * r);
    want.magnitude[e] = take_result(run, n);
    want.lost[e] = take(run, n, sizeof(double));
  }
  run_backward(run, &args, &run->executor);
  plain_lora_linear_backward(&args, made->weight, &want);
  double* budget = take(run, m * k, sizeof(double));
  for (int64_t i = 0; i < m * k; ++i)
    // The gain times grad_y goes through W in bf16, rounded once.
    budget[i] = sum_error(n + made->widest, want.x.size[i]) +
                (has_bf16_products(run) ? 0x1p-9 * want.scaled[i] : 0);
  check_values(run, "grad_x", args.grad_x, test->dtype, want.x.value, budget, m * k);
  check_gradient(run, "grad_bias", args.grad_bias, want.bias, m, NULL, n);
  for (int64_t e = 0; e < count; ++e) {
    const int64_t r = adapters[e].r, rows = adapters[e].row_end - adapters[e].row_begin;
    const double* lost = made->difficulty == kOrdinary ? want.lost[e] : NULL;
    check_gradient(run, "grad_A", adapters[e].grad_A, want.A[e], n + rows, NULL, r * k);
    check_gradient(run, "grad_B", adapters[e].grad_B, want.B[e], rows, NULL, n * r);
    check_gradient(run, "grad_magnitude", adapters[e].grad_magnitude, want.magnitude[e],
                   k + r + rows, lost, n);
  }

  // Some of them only, without y and without threads: nothing else changes.
  feinwerk_lora_linear_backward_args less = args;
  memcpy(some, adapters, sizeof some);
  less.adapters = some;
  less.y = NULL;
  less.grad_x = below(run, 3) ? take(run, m * k, (size_t)size) : NULL;
  less.grad_bias = below(run, 2) ? take(run, n, 4) : NULL;
  for (int64_t e = 0; e < count; ++e) {
    some[e].grad_A = below(run, 2) ? take(run, some[e].r * k, 4) : NULL;
    some[e].grad_B = below(run, 2) ? take(run, n * some[e].r, 4) : NULL;
    some[e].grad_magnitude = below(run, 3) ? take(run, n, 4) : NULL;
  }
  run_backward(run, &less, NULL);
  if (less.grad_x) same_bytes(run, "grad_x (less)", less.grad_x, args.grad_x, m * k * size);
  same_gradient(run, "grad_bias (less)", less.grad_bias, args.grad_bias, n);
  for (int64_t e = 0; e < count; ++e) {
    const int64_t r = some[e].r, rows = some[e].row_end - some[e].row_begin;
    same_gradient(run, "grad_A (less)", some[e].grad_A, adapters[e].grad_A, r * k);
    same_gradient(run, "grad_B (less)", some[e].grad_B, adapters[e].grad_B, n * r);
    if (some[e].grad_magnitude)
      check_gradient(run, "grad_magnitude (without y)", some[e].grad_magnitude, want.magnitude[e],
                     k + r + rows, NULL, n);
  }
}

static void check_call(context* run, feinwerk_weight weight, const double* dense, const char* step,
                       const char* back) {
  const test_case* test = run->test;
  call made = {.weight = dense, .difficulty = (difficulty)below(run, 3)};
  feinwerk_lora_linear_args* args = &made.forward;
  args->weight = weight;
  args->dtype = test->dtype;
  args->m = test->m;
  args->x = random_values(run, test->m * test->k, test->dtype);
  args->y = take(run, test->m * test->n, plain_size(test->dtype));
  args->compute = below(run, 3) == 0 ? FEINWERK_COMPUTE_INT8 : FEINWERK_COMPUTE_EXACT;
  random_dropout(run, &args->dropout);
  random_bias(run, &made);
  random_adapters(run, &made);
  args->s = take(run, args->m * args->s_cols, 4);
  run->step = step;
  check_forward(run, &made);
  run->step = back;
  check_backward(run, &made);
}

void check_adapters(context* run, const feinwerk_nf4_weight* nf4) {
  const test_case* test = run->test;
  const int64_t count = test->n * test->k;
  double* weight = take(run, count, sizeof(double));
  const int own = run->buffer_count;
  const int draws = test->m * count > 100000 ? 1 : test->m * count > 5000 ? 3 : 8;
  for (int draw = 0; draw < draws; ++draw) {
    for (int64_t i = 0; i < count; ++i) weight[i] = (double)plain_nf4_element(nf4, i, test->dtype);
    check_call(run, (feinwerk_weight){.nf4 = *nf4}, weight, "lora_linear", "lora_linear_backward");
    const feinwerk_dtype dtype = kDtypes[below(run, 3)];
    const void* dense = random_values(run, count, dtype);
    for (int64_t i = 0; i < count; ++i)
      weight[i] = (double)plain_round(plain_load(dense, dtype, i), test->dtype);
    const feinwerk_weight all = {
        .nf4 = {.rows = test->n, .cols = test->k}, .dense = dense, .dense_dtype = dtype};
    check_call(run, all, weight, "lora_linear (dense)", "lora_linear_backward (dense)");
    free_buffers(run, own);
  }
}
