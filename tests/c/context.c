// Buffers, random data and comparisons of the cases.
#include "context.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

const feinwerk_dtype kDtypes[3] = {FEINWERK_FLOAT32, FEINWERK_BFLOAT16, FEINWERK_FLOAT16};

void fail(const context* run, const char* what, int64_t index, double got, double want) {
  const test_case* test = run->test;
  fprintf(stderr,
          "FAILED %s on %s: %s[%lld] is %.9g, want %.9g\n"
          "  case m=%lld n=%lld k=%lld blocksize=%lld dtype=%d nested=%d shift=%d threads=%lld "
          "seed=%llu\n",
          run->step, run->isa, what, (long long)index, got, want, (long long)test->m,
          (long long)test->n, (long long)test->k, (long long)test->blocksize, (int)test->dtype,
          test->nested, test->shift, (long long)test->threads, (unsigned long long)test->seed);
  exit(1);
}

void expect_ok(const context* run, feinwerk_status status) {
  if (status == FEINWERK_OK) return;
  fprintf(stderr, "%s\n", feinwerk_last_error());
  fail(run, "status", 0, status, FEINWERK_OK);
}

void* take(context* run, int64_t count, size_t element) {
  const size_t shift = run->test->shift ? element : 0;
  const size_t bytes = (size_t)count * element;
  unsigned char* block = malloc(shift + bytes + (shift + bytes == 0));
  if (!block || run->buffer_count == kMaxBuffers) fail(run, "buffers", run->buffer_count, 0, 0);
  memset(block, 0xff, shift + bytes);
  run->buffers[run->buffer_count++] = block;
  return block + shift;
}

void* take_workspace(context* run, int64_t bytes) {
  void* block = aligned_alloc(64, bytes > 0 ? (size_t)(bytes + 63) / 64 * 64 : 64);
  if (!block || run->buffer_count == kMaxBuffers) fail(run, "workspace", 0, 0, (double)bytes);
  run->buffers[run->buffer_count++] = block;
  return block;
}

void free_buffers(context* run, int keep) {
  while (run->buffer_count > keep) free(run->buffers[--run->buffer_count]);
}

int64_t below(context* run, int64_t limit) {
  return (int64_t)(next_random(&run->random) % (uint64_t)limit);
}

float uniform(context* run) {
  return (float)((double)(next_random(&run->random) >> 40) * 0x1p-23 - 1.0);
}

void* random_values(context* run, int64_t count, feinwerk_dtype dtype) {
  void* values = take(run, count, plain_size(dtype));
  int64_t zeros = 0;
  for (int64_t i = 0; i < count; ++i) {
    float value = uniform(run) + uniform(run) + uniform(run);
    const uint64_t kind = next_random(&run->random) % 4096;
    if (kind < 4) zeros = 150;
    if (kind > 4090) value *= 20;
    plain_store(values, dtype, i, zeros > 0 ? 0 : value);
    if (zeros > 0) --zeros;
  }
  return values;
}

void same_bytes(context* run, const char* what, const void* got, const void* want, int64_t bytes) {
  const uint8_t *a = got, *b = want;
  for (int64_t i = 0; i < bytes; ++i)
    if (a[i] != b[i]) fail(run, what, i, a[i], b[i]);
}

double* widen(context* run, const void* values, feinwerk_dtype dtype, int64_t count) {
  double* wide = take(run, count, sizeof(double));
  for (int64_t i = 0; i < count; ++i) wide[i] = (double)plain_load(values, dtype, i);
  return wide;
}

void check_values(context* run, const char* what, const void* got, feinwerk_dtype dtype,
                  const double* want, const double* budget, int64_t count) {
  double most = 0;
  for (int64_t i = 0; i < count; ++i) most = fmax(most, fabs(want[i]));
  for (int64_t i = 0; i < count; ++i) {
    const double value = plain_load(got, dtype, i);
    if (!(fabs(value - want[i]) <= budget[i] + plain_ulp(want[i], dtype) + plain_ulp(most, dtype)))
      fail(run, what, i, value, want[i]);
  }
}

double sum_error(int64_t depth, double size) {
  return 4 * sqrt((double)depth + 1) * 0x1p-24 * size;
}

double* int8_slack(context* run, const void* x, const feinwerk_nf4_weight* weight,
                   const double* dense) {
  const test_case* test = run->test;
  const double* wide = widen(run, x, test->dtype, test->m * test->k);
  double* slack = take(run, test->m * test->n, sizeof(double));
  double* most = take(run, test->k, sizeof(double));
  for (int64_t row = 0; row < test->m; ++row) {
    const double* values = wide + row * test->k;
    for (int64_t i = 0; i < test->k; ++i) {
      most[i] = 0;
      for (int64_t j = i / 64 * 64; j < test->k && j < i / 64 * 64 + 64; ++j)
        most[i] = fmax(most[i], fabs(values[j]));
    }
    for (int64_t o = 0; o < test->n; ++o) {
      double sum = 0;
      for (int64_t i = 0; i < test->k; ++i) {
        const int64_t element = o * test->k + i;
        const double absmax = plain_nf4_absmax(weight, element / weight->blocksize);
        sum += most[i] * fabs(dense[element]) + fabs(values[i] * absmax);
      }
      slack[row * test->n + o] = sum / 127;
    }
  }
  return slack;
}
