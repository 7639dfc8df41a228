// One case: random data in buffers of the exact size, every operation, every value compared.
#include "cases.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>

#include "adamw_cases.h"
#include "adapter_cases.h"
#include "context.h"

uint64_t next_random(uint64_t* state) {
  uint64_t z = (*state += 0x9e3779b97f4a7c15u);
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
  return z ^ (z >> 31);
}

static void last_first(void* self, int64_t tasks, void (*fn)(void*, int64_t), void* arg) {
  (void)self;
  for (int64_t task = tasks - 1; task >= 0; --task) fn(arg, task);
}

// Signed, ascending, finer around zero: the shape of bitsandbytes' dynamic map.
static float* nested_codebook(context* run) {
  float* codebook = take(run, 256, sizeof(float));
  for (int i = 0; i < 256; ++i) {
    const float t = (float)(i - 127) / 128.0f;
    codebook[i] = t * fabsf(t);
  }
  return codebook;
}

static void check_quantize(context* run, const void* weight, int64_t count, feinwerk_rule rule,
                           feinwerk_nf4_weight* quantized) {
  const test_case* test = run->test;
  const int64_t bytes = count / 2 + count % 2;
  const int64_t blocks = (count + test->blocksize - 1) / test->blocksize;
  uint8_t *packed = take(run, bytes, 1), *want_packed = take(run, bytes, 1);
  float *absmax = take(run, blocks, 4), *want_absmax = take(run, blocks, 4);
  run->step = rule == FEINWERK_RULE_CPU ? "nf4_quantize (cpu)" : "nf4_quantize (cuda)";
  const feinwerk_nf4_quantize_args args = {.weight = weight,
                                           .dtype = test->dtype,
                                           .count = count,
                                           .blocksize = test->blocksize,
                                           .rule = rule,
                                           .packed = packed,
                                           .packed_bytes = bytes,
                                           .absmax = absmax,
                                           .absmax_count = blocks};
  expect_ok(run, feinwerk_nf4_quantize(&args, &run->executor));
  plain_nf4_quantize(weight, test->dtype, count, test->blocksize, rule, want_packed, want_absmax);
  same_bytes(run, "packed", packed, want_packed, bytes);
  same_bytes(run, "absmax", absmax, want_absmax, blocks * 4);
  *quantized = (feinwerk_nf4_weight){.rows = test->n,
                                     .cols = test->k,
                                     .blocksize = test->blocksize,
                                     .packed = packed,
                                     .packed_bytes = bytes,
                                     .absmax = absmax,
                                     .absmax_count = blocks};
}

// Quantizes x to 8 bits and back; the codes, scales and offset are what double quantization stores.
static feinwerk_blockwise_quantize_args check_blockwise(context* run, const float* x, int64_t count,
                                                        int64_t row_length, int64_t blocksize,
                                                        feinwerk_rule rule, int center) {
  const int64_t row = row_length ? row_length : count, in_row = (row + blocksize - 1) / blocksize;
  const int64_t blocks = row ? count / row * in_row : 0;
  feinwerk_blockwise_quantize_args args = {.x = x,
                                           .count = count,
                                           .blocksize = blocksize,
                                           .row_length = row_length,
                                           .codebook = nested_codebook(run),
                                           .rule = rule,
                                           .center = center,
                                           .codes = take(run, count, 1),
                                           .absmax = take(run, blocks, 4),
                                           .absmax_count = blocks,
                                           .offset = take(run, 1, 4)};
  run->step = rule == FEINWERK_RULE_CPU ? "blockwise_quantize (cpu)" : "blockwise_quantize (cuda)";
  expect_ok(run, feinwerk_blockwise_quantize(&args, &run->executor));
  double sum = 0, size = 0;
  for (int64_t i = 0; i < count; ++i) {
    sum += (double)x[i];
    size += fabs((double)x[i]);
  }
  const double mean = center && count ? sum / (double)count : 0;
  const double slack = center && count ? 1e-5 * size / (double)count : 0;
  if (!(fabs((double)*args.offset - mean) <= slack)) fail(run, "offset", 0, *args.offset, mean);
  uint8_t* codes = take(run, count, 1);
  float* absmax = take(run, blocks, 4);
  plain_blockwise_quantize(x, *args.offset, center, count, row, blocksize, args.codebook, rule,
                           codes, absmax);
  same_bytes(run, "codes", args.codes, codes, count);
  same_bytes(run, "absmax", args.absmax, absmax, blocks * 4);

  run->step = "blockwise_dequantize";
  float *out = take(run, count, 4), *want = take(run, count, 4);
  for (int64_t i = 0; i < count; ++i) {
    const float product = args.codebook[codes[i]] * absmax[i / row * in_row + i % row / blocksize];
    want[i] = center ? product + *args.offset : product;
  }
  const feinwerk_blockwise_dequantize_args back = {.codes = codes,
                                                   .count = count,
                                                   .blocksize = blocksize,
                                                   .row_length = row_length,
                                                   .codebook = args.codebook,
                                                   .absmax = absmax,
                                                   .absmax_count = blocks,
                                                   .offset = center ? args.offset : NULL,
                                                   .out = out};
  expect_ok(run, feinwerk_blockwise_dequantize(&back, &run->executor));
  same_bytes(run, "out", out, want, count * 4);
  return args;
}

static void check_dequantize(context* run, const feinwerk_nf4_weight* weight) {
  const int64_t count = weight->rows * weight->cols;
  run->step = "nf4_dequantize";
  for (int d = 0; d < 3; ++d) {
    const size_t size = plain_size(kDtypes[d]);
    void *out = take(run, count, size), *want = take(run, count, size);
    for (int64_t i = 0; i < count; ++i)
      plain_store(want, kDtypes[d], i, plain_nf4_element(weight, i, kDtypes[d]));
    const feinwerk_nf4_dequantize_args args = {*weight, out, kDtypes[d], count};
    expect_ok(run, feinwerk_nf4_dequantize(&args, &run->executor));
    same_bytes(run, "out", out, want, count * (int64_t)size);
  }
}

static void check_embedding(context* run, const feinwerk_nf4_weight* weight) {
  const test_case* test = run->test;
  if (test->n == 0) return;
  const size_t size = plain_size(test->dtype);
  const int64_t count = test->m * test->k;
  int64_t* indices = take(run, test->m, 8);
  void *out = take(run, count, size), *want = take(run, count, size);
  for (int64_t i = 0; i < test->m; ++i) {
    indices[i] = (int64_t)(next_random(&run->random) % (uint64_t)test->n);
    for (int64_t j = 0; j < test->k; ++j)
      plain_store(want, test->dtype, i * test->k + j,
                  plain_nf4_element(weight, indices[i] * test->k + j, test->dtype));
  }
  run->step = "nf4_embedding";
  const feinwerk_nf4_embedding_args args = {*weight, indices, test->m, out, test->dtype, count};
  expect_ok(run, feinwerk_nf4_embedding(&args, &run->executor));
  same_bytes(run, "out", out, want, count * (int64_t)size);
}

// One product y[rows, outer] = a[rows, inner] @ B + bias against doubles, where B(o, i) is element
// o * outer_stride + i * inner_stride of the weight. slack[row * outer + o] is added to the budget.
static void check_product(context* run, const void* got, const void* a, int64_t rows, int64_t outer,
                          int64_t outer_stride, int64_t inner, int64_t inner_stride,
                          const double* weight, const double* bias, const double* slack) {
  const feinwerk_dtype dtype = run->test->dtype;
  double* wide = widen(run, a, dtype, rows * inner);
  double* want = take(run, rows * outer, sizeof(double));
  double* budget = take(run, rows * outer, sizeof(double));
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t o = 0; o < outer; ++o) {
      double sum = bias ? bias[o] : 0, size = fabs(sum);
      for (int64_t i = 0; i < inner; ++i) {
        const double term = wide[row * inner + i] * weight[o * outer_stride + i * inner_stride];
        sum += term;
        size += fabs(term);
      }
      const int64_t at = row * outer + o;
      want[at] = sum;
      budget[at] = sum_error(inner, size) + (slack ? slack[at] : 0);
    }
  }
  check_values(run, "y", got, dtype, want, budget, rows * outer);
}

static void check_linear(context* run, const feinwerk_nf4_weight* weight, const double* dense,
                         feinwerk_compute compute, int with_bias) {
  const test_case* test = run->test;
  const int64_t count = test->m * test->n;
  const size_t size = plain_size(test->dtype);
  const void* x = random_values(run, test->m * test->k, test->dtype);
  const feinwerk_dtype bias_dtype = kDtypes[next_random(&run->random) % 3];
  const void* bias = with_bias ? random_values(run, test->n, bias_dtype) : NULL;
  const double* wide_bias = with_bias ? widen(run, bias, bias_dtype, test->n) : NULL;
  feinwerk_nf4_linear_args args = {.weight = *weight,
                                   .x = x,
                                   .y = take(run, count, size),
                                   .dtype = test->dtype,
                                   .m = test->m,
                                   .bias = bias,
                                   .bias_dtype = bias_dtype,
                                   .compute = compute};
  run->step = compute == FEINWERK_COMPUTE_INT8 ? "nf4_linear (int8)" : "nf4_linear";
  expect_ok(run,
            feinwerk_nf4_linear_workspace(test->m, test->n, test->k, test->blocksize, test->dtype,
                                          compute, run->executor.threads, &args.workspace_bytes));
  args.workspace = take_workspace(run, args.workspace_bytes);
  expect_ok(run, feinwerk_nf4_linear(&args, &run->executor));
  const int int8 = compute == FEINWERK_COMPUTE_INT8;
  check_product(run, args.y, x, test->m, test->n, test->k, test->k, 1, dense, wide_bias,
                int8 ? int8_slack(run, x, weight, dense) : NULL);
  feinwerk_nf4_linear_args serial = args;
  serial.y = take(run, count, size);
  expect_ok(run, feinwerk_nf4_linear(&serial, NULL));
  same_bytes(run, "y (serial against threads)", serial.y, args.y, count * (int64_t)size);
}

static void check_backward(context* run, const feinwerk_nf4_weight* weight, const double* dense) {
  const test_case* test = run->test;
  const int64_t count = test->m * test->k;
  const size_t size = plain_size(test->dtype);
  feinwerk_nf4_linear_backward_args args = {
      .weight = *weight,
      .grad_y = random_values(run, test->m * test->n, test->dtype),
      .grad_x = take(run, count, size),
      .dtype = test->dtype,
      .m = test->m};
  run->step = "nf4_linear_backward";
  expect_ok(run, feinwerk_nf4_linear_backward_workspace(test->m, test->n, test->k, test->blocksize,
                                                        test->dtype, run->executor.threads,
                                                        &args.workspace_bytes));
  args.workspace = take_workspace(run, args.workspace_bytes);
  expect_ok(run, feinwerk_nf4_linear_backward(&args, &run->executor));
  check_product(run, args.grad_x, args.grad_y, test->m, test->k, 1, test->n, test->k, dense, NULL,
                NULL);
  feinwerk_nf4_linear_backward_args serial = args;
  serial.grad_x = take(run, count, size);
  expect_ok(run, feinwerk_nf4_linear_backward(&serial, NULL));
  same_bytes(run, "grad_x (serial against threads)", serial.grad_x, args.grad_x,
             count * (int64_t)size);
}

void check_case(const test_case* test) {
  context run = {.test = test, .random = test->seed, .step = "force_isa"};
  run.executor = (feinwerk_executor){NULL, test->threads, test->threads > 1 ? last_first : NULL};
  expect_ok(&run, feinwerk_active_isa(&run.isa));
  const int64_t count = test->n * test->k;
  const void* values = random_values(&run, count, test->dtype);
  feinwerk_nf4_weight weight, other;
  check_quantize(&run, values, count, FEINWERK_RULE_CUDA, &other);
  check_quantize(&run, values, count, FEINWERK_RULE_CPU, &weight);
  const float* x = random_values(&run, count, FEINWERK_FLOAT32);
  const int64_t any_blocksize = 1 + (int64_t)(next_random(&run.random) % 300);
  for (int rows = 0; rows < 2; ++rows) {
    const int64_t row_length = rows ? test->k : 0;
    check_blockwise(&run, x, count, row_length, any_blocksize, FEINWERK_RULE_CUDA, 1);
    check_blockwise(&run, x, count, row_length, any_blocksize, FEINWERK_RULE_CPU, 0);
  }
  if (test->nested) {
    const feinwerk_blockwise_quantize_args nested =
        check_blockwise(&run, weight.absmax, weight.absmax_count, 0, 256, FEINWERK_RULE_CPU, 1);
    weight.absmax = NULL;
    weight.absmax_codes = nested.codes;
    weight.nested_absmax = nested.absmax;
    weight.nested_absmax_count = nested.absmax_count;
    weight.nested_codebook = nested.codebook;
    weight.nested_offset = nested.offset;
  }
  check_dequantize(&run, &weight);
  check_embedding(&run, &weight);
  double* dense = take(&run, count, sizeof(double));
  for (int64_t i = 0; i < count; ++i) dense[i] = (double)plain_nf4_element(&weight, i, test->dtype);
  check_linear(&run, &weight, dense, FEINWERK_COMPUTE_EXACT, 0);
  check_linear(&run, &weight, dense, FEINWERK_COMPUTE_EXACT, 1);
  check_linear(&run, &weight, dense, FEINWERK_COMPUTE_INT8, 1);
  check_backward(&run, &weight, dense);
  check_adapters(&run, &weight);
  check_adamw(&run);
  check_square_sum(&run);
  free_buffers(&run, 0);
}

void check_case_on_every_isa(const test_case* test) {
  for (int64_t isa = 0; isa < feinwerk_isa_count(); ++isa) {
    if (!feinwerk_isa_available(isa)) continue;
    if (feinwerk_force_isa(feinwerk_isa_name(isa)) != FEINWERK_OK) {
      fprintf(stderr, "FAILED to force %s: %s\n", feinwerk_isa_name(isa), feinwerk_last_error());
      exit(1);
    }
    check_case(test);
  }
  feinwerk_force_isa(NULL);
}
